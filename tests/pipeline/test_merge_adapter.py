"""An adapter makes the pictures of the model that it is merged into, by itself or merged."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flow.adapter import FIRST, SECOND, AdapterSpec
from flow.codec import VideoCodec
from flow.flow import FlowModel
from flow.model_folder import ModelSpec, load_model, read_spec, save_model, write_model
from flow.tensor_files import TensorFolder
from flow.text_spec import TextSpec
from flow.video_spec import VideoSpec
from pipeline.cli import app
from serving.loading import load
from tests.flow.models import randn, shaken, tiny_config
from tests.places import TINY_CODEC

PRODUCTS = (
    "flow.deep.layers.0.attention.qkv",
    "flow.deep.layers.1.mlp.down",
    "denoiser.layers.0.mlp.up",
)


def flowreel(*arguments: object, code: int = 0) -> str:
    """Output of a command, run in this process to spare its imports."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec = VideoCodec.load(TINY_CODEC)
    model = FlowModel(tiny_config(latent_channels=codec.latent_channels))
    shaken(model, scale=0.5)
    spec = ModelSpec(
        flow=model.config,
        text=TextSpec("hashed", 6, 16),
        codec="codec",
        codec_digest=codec.digest,
        video=VideoSpec(9, 32, 32, 8.0),
    )
    folder = tmp_path_factory.mktemp("base") / "model"
    return save_model(folder, model, spec, extra={"codec": Path(TINY_CODEC)})


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """An adapter beside its base, which it names by a relative path."""
    files = TensorFolder.open(base)
    pairs = {}
    for number, name in enumerate(PRODUCTS):
        rows, columns = files.shapes[f"{name}.weight"]
        pairs[name + FIRST] = randn(3, columns, seed=number, dtype=torch.float32)
        pairs[name + SECOND] = randn(rows, 3, seed=9 + number, dtype=torch.float32)
    about = AdapterSpec("../model", files.digest(), rank=3, alpha=0.5)
    spec = dataclasses.replace(read_spec(base), adapter=about)
    return write_model(base.parent / "adapter", pairs, spec)


def test_a_merged_adapter_is_an_ordinary_model_of_the_same_weights(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "merged in" in flowreel("merge-adapter", adapter, "-o", out)
    spec = read_spec(out)
    assert spec == read_spec(base)
    assert (out / "codec").is_dir()
    merged, by_itself, before = (load_model(f)[0].state_dict() for f in (out, adapter, base))
    assert all(torch.equal(merged[name], by_itself[name]) for name in merged)
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {f"{name}.weight" for name in PRODUCTS}


def test_an_adapter_is_sampled_and_served_as_the_merged_model_is(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flowreel("merge-adapter", adapter, "--model", base, "--out", out)
    pictures = []
    for number, folder in enumerate((adapter, out, base)):
        path = tmp_path / f"{number}.png"
        flowreel("sample", folder, "-p", "a circle", "--frames", 1, "--seed", 3, "--out", path)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
    # A replica of the service holds a part of it.
    for deployment in ("deep", "decode"):
        parts = [load(folder, deployment=deployment) for folder in (adapter, out)]
        one, two = (part.model.state_dict() for part in parts)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert [part.facts.num_frames for part in parts] == [9, 9]


def test_what_cannot_be_merged_is_refused_in_one_line(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        return flowreel("merge-adapter", *arguments, code=2)

    out = tmp_path / "out"
    assert "is a whole model, no adapter" in refused(base, "-o", out)
    assert "holds a model already" in refused(adapter, "-o", base)
    model, spec = load_model(base)
    shaken(model, seed=1)
    save_model(tmp_path / "other", model, dataclasses.replace(spec, codec=None))
    assert "was trained on a model of digest" in refused(
        adapter, "--model", tmp_path / "other", "-o", out
    )
    alone = shutil.copytree(adapter, tmp_path / "alone" / "adapter")
    assert "which is not there" in refused(alone, "-o", out)
    assert not out.exists()
    flowreel("merge-adapter", alone, "--model", base, "-o", out)
    assert read_spec(out) == read_spec(base)
