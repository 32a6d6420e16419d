"""Model folders: whole or not at all, and errors that name the tensors."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flow.model_folder as model_folder
from flow import tensor_files
from flow.codec import LatentConvention
from flow.config import ConfigError
from flow.flow import FlowModel
from flow.model_folder import (
    CheckpointError,
    ModelSpec,
    VideoSpec,
    load_model,
    read_spec,
    save_model,
)
from flow.tensor_files import TensorFolder, write_tensors
from flow.text import TextSpec
from tests.flow.models import TINY, randn, texts, tiny_config, tiny_model
from tests.places import ROOT

SPEC = ModelSpec(
    flow=TINY,
    text=TextSpec(kind="hashed", length=6, dim=16),
    codec="codec",
    codec_digest="abc",
    latents=LatentConvention(mean=(0.0,) * 4, std=(1.0,) * 4),
    video=VideoSpec(num_frames=17, height=64, width=64, fps=8),
)


@pytest.fixture
def model() -> FlowModel:
    return tiny_model(torch.float32)


def test_saved_model_comes_back_with_its_spec(tmp_path: Path, model: FlowModel) -> None:
    save_model(tmp_path / "m", model, SPEC)
    loaded, spec = load_model(tmp_path / "m")
    assert spec == SPEC == read_spec(tmp_path / "m")
    assert not loaded.training
    x, (text, _) = randn(1, 2, 4, 2, 2).float(), texts(model, 1, torch.float32)
    assert torch.equal(loaded.flow(x, text).z_BTHWC, model.flow(x, text).z_BTHWC)
    half, _ = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    loaded.flow(x, text).loss().backward()


def test_what_is_left_out_is_not_read(
    tmp_path: Path, model: FlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m", model, SPEC)
    read = []
    cast = tensor_files._cast
    monkeypatch.setattr(
        tensor_files, "_cast", lambda value, dtype: read.append(value.numel()) or cast(value, dtype)
    )
    deep, _ = load_model(tmp_path / "m", leave_out=("flow.shallow", "denoiser"))
    assert (len(deep.flow.shallow), deep.denoiser) == (0, None)
    whole = model.state_dict()
    for name, value in deep.state_dict().items():
        assert torch.equal(value, whole[name])
    assert sum(read) == sum(value.numel() for value in deep.state_dict().values())
    assert 0 < sum(read) < sum(value.numel() for value in whole.values())


def test_extra_files_arrive_with_the_model_and_a_model_is_replaced_whole(
    tmp_path: Path, model: FlowModel
) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "config.json").write_text("{}")
    save_model(tmp_path / "m", model, SPEC, extra={"codec": tmp_path / "codec"})
    assert (tmp_path / "m" / "codec" / "config.json").read_text() == "{}"
    save_model(tmp_path / "m", model, SPEC)
    assert not (tmp_path / "m" / "codec").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec", "m"]


def test_a_failing_save_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, model: FlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m", model, SPEC)
    before = load_file(tmp_path / "m" / "model.safetensors")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model_folder, "sync_file", full)
    for name in ("m", "new"):
        with pytest.raises(OSError, match="no space"):
            save_model(tmp_path / name, model, SPEC)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == before.keys()


def test_folders_that_are_no_models_are_left_alone(tmp_path: Path, model: FlowModel) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not a model"):
        save_model(tmp_path, model, SPEC)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_model(tmp_path)


def test_a_spec_of_another_structure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="structure"):
        save_model(tmp_path / "m", tiny_model(torch.float32, patch_size=2), SPEC)


def test_missing_extra_and_wrong_tensors_are_named_with_shapes(
    tmp_path: Path, model: FlowModel
) -> None:
    folder = save_model(tmp_path / "m", model, SPEC)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["flow.deep.sos"]
    tensors["flow.deep.extra"] = torch.zeros(2)
    tensors["denoiser.proj_in.weight"] = torch.zeros(3, 5)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as refusal:
        load_model(folder)
    message = str(refusal.value)
    assert "missing: flow.deep.sos [1, 1, 4]" in message
    assert "unexpected: flow.deep.extra [2]" in message
    assert "denoiser.proj_in.weight is [3, 5], needs [32, 4]" in message


def test_a_cut_file_and_a_foreign_config_are_refused(tmp_path: Path, model: FlowModel) -> None:
    folder = save_model(tmp_path / "m", model, SPEC)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cut short"):
        load_model(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no"):
        load_model(folder)
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    for changed, reason in (
        ({**fields, "colour": 1}, "colour"),
        ({**fields, "format": "other"}, "format"),
        ({**fields, "text": {"kind": "hashed", "size": 3}}, "size"),
    ):
        config.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=reason):
            read_spec(folder)
    config.write_text(json.dumps({**fields, "flow": {**fields["flow"], "widht": 3}}))
    with pytest.raises(ConfigError, match="widht"):
        read_spec(folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_spec(folder)


def _sharded(folder: Path, model: FlowModel, shard_bytes: int) -> Path:
    """A model folder like `save_model`'s, but in shards of so many bytes."""
    folder.mkdir()
    write_tensors(folder, model.state_dict(), shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(SPEC.to_dict()))
    return folder


@pytest.mark.parametrize("shard_bytes", [1, 50_000])
def test_shards_hold_the_same_model_as_one_file(
    tmp_path: Path, model: FlowModel, shard_bytes: int
) -> None:
    whole, _ = load_model(save_model(tmp_path / "whole", model, SPEC))
    folder = _sharded(tmp_path / "sharded", model, shard_bytes)
    parts, spec = load_model(folder)
    assert spec == SPEC
    assert not (folder / "model.safetensors").exists()
    assert whole.state_dict().keys() == parts.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name
    # As other tools read the layout: every name in the file that the index says, sizes added up.
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    count = len(set(index["weight_map"].values()))
    for i, name in enumerate(sorted(set(index["weight_map"].values())), start=1):
        assert name == f"model-{i:05d}-of-{count:05d}.safetensors"
        tensors = load_file(folder / name)
        assert sorted(tensors) == sorted(k for k, v in index["weight_map"].items() if v == name)
        assert len(tensors) == 1 or sum(v.nbytes for v in tensors.values()) <= shard_bytes
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in model.state_dict().values())


def test_conversion_is_of_floating_point_tensors_and_views_are_written_alone(
    tmp_path: Path,
) -> None:
    base = torch.arange(8.0)
    tensors = {"a": base[2:5], "b": base[5:], "t": base.view(2, 4).T, "n": torch.arange(3)}
    reports: list[tuple[int, int]] = []
    write_tensors(
        tmp_path,
        tensors,
        dtype=torch.bfloat16,
        shard_bytes=12,
        progress=lambda done, total: reports.append((done, total)),
    )
    written = {k: v for part in TensorFolder.open(tmp_path).read() for k, v in part.items()}
    assert written["n"].dtype == torch.int64
    for name in ("a", "b", "t"):
        assert torch.equal(written[name], tensors[name].bfloat16()), name
    assert reports == [(12, 52), (28, 52), (52, 52)]
    (tmp_path / "kept").mkdir()
    write_tensors(tmp_path / "kept", tensors)
    (written,) = TensorFolder.open(tmp_path / "kept").read()
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


def test_broken_shards_and_indices_are_named(tmp_path: Path, model: FlowModel) -> None:
    folder = _sharded(tmp_path / "m", model, 50_000)
    index, shard = folder / "model.safetensors.index.json", sorted(folder.glob("model-*"))[1]
    good, text = shard.read_bytes(), index.read_text()

    def refusal() -> str:
        with pytest.raises(CheckpointError) as refused:
            load_model(folder)
        return str(refused.value)

    shard.unlink()
    assert f"has no {shard.name}" in refusal()
    shard.write_bytes(good[: len(good) // 2])
    assert f"{shard.name} is cut short" in refusal()
    tensors = load_file(sorted(folder.glob("model-*"))[0])
    save_file(tensors, shard)
    assert f"{shard.name} lacks tensors that the index puts there: " in refusal()
    shard.write_bytes(good)
    fields = json.loads(text)
    fields["weight_map"]["flow.deep.sos"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(fields))
    assert "lie in the folder" in refusal()
    for nonsense in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(nonsense)
        assert "is no index of shards" in refusal()
    index.write_text(text)
    assert load_model(folder)[1] == SPEC


KILLED = """
import os, signal, sys
from flow.model_folder import write_model
from tests.flow.test_model_folder import SPEC, tiny_model, torch

def die(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

write_model(sys.argv[1], tiny_model(torch.float32).state_dict(), SPEC, progress=die)
"""


@pytest.mark.parametrize("before", [False, True])
def test_a_writer_killed_between_shards_leaves_no_half_model_and_its_remains_are_removed(
    tmp_path: Path, model: FlowModel, before: bool
) -> None:
    if before:
        save_model(tmp_path / "m", model, SPEC)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "m")],
        cwd=ROOT,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "m").exists() == before
    assert len(list(tmp_path.glob(".m-*.tmp"))) == 1
    if before:
        load_model(tmp_path / "m")
    save_model(tmp_path / "m", model, SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    load_model(tmp_path / "m")


def test_a_model_that_a_killed_writer_had_put_aside_is_kept_until_another_stands(
    tmp_path: Path, model: FlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is there after a kill between the two renames.
    written, aside = save_model(tmp_path / "m", model, SPEC), tmp_path / ".m-0123abcd.old"
    aside.mkdir()
    written.rename(aside / "model")
    others = [tmp_path / name for name in (".m-v2-0123abcd.old", ".m-v2-0123abcd.tmp", "m.tmp")]
    for other in others:
        other.mkdir()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(model_folder, "sync_file", full)
    with pytest.raises(OSError, match="no space"):
        save_model(tmp_path / "m", model, SPEC)
    monkeypatch.undo()
    assert load_model(aside / "model")[1] == SPEC
    save_model(tmp_path / "m", model, SPEC)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "m", *others])


def test_two_writers_of_one_folder_do_not_remove_each_others_work(
    tmp_path: Path, model: FlowModel
) -> None:
    def write_another(written_bytes: int, total: int) -> None:
        if written_bytes == total and not (tmp_path / "m").exists():
            save_model(tmp_path / "m", model, SPEC)

    model_folder.write_model(tmp_path / "m", model.state_dict(), SPEC, progress=write_another)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    load_model(tmp_path / "m")


LOADING = """
import sys, threading, time
from flow.model_folder import load_model

def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024

before, peak, stop = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model, _ = load_model(sys.argv[1])
peak = max(peak, anonymous())
stop.set()
watcher.join()
print((peak - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shard_bytes", [16 << 20, 1 << 30])
def test_loading_and_converting_holds_the_model_once(tmp_path: Path, shard_bytes: int) -> None:
    wide = tiny_config(deep_width=1024, layers_per_block=(1, 4), denoiser=False)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in FlowModel(wide).state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    write_tensors(tmp_path, tensors, shard_bytes=shard_bytes)
    spec = dataclasses.replace(SPEC, flow=wide)
    (tmp_path / "config.json").write_text(json.dumps(spec.to_dict()))
    child = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert float(child.stdout) < 1.15, "multiples of the model's own size in fp32"
