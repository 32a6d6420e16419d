"""Names, fingerprints, the lock, manifests, and a commit that is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.ledger.errors import DamagedManifest, OutputBusy, SettingsChanged
from data_prep.ledger.locks import lock_output
from data_prep.ledger.manifest import Manifest, read_manifest, read_manifests
from data_prep.sources.find import name_shards
from data_prep.sources.listing import ShardError
from data_prep.storage.location import StorageError
from data_prep.storage.store import open_folder
from tests.data_prep.in_process import digests, prepare_locally
from tests.places import ROOT


def test_shards_are_named_by_the_shortest_ending_that_tells_them_apart() -> None:
    names = name_shards(["/a/x/0.tar", "/b/x/0.tar", "s3://bucket/1.tar.gz", "2.tar"])
    assert list(names) == ["a__x__0", "b__x__0", "1", "2"]


@pytest.mark.parametrize(
    ("sources", "words"), [([], "at least one"), (["a.tar", "a.tar"], "given twice")]
)
def test_no_shards_or_the_same_twice_is_refused(sources: list[str], words: str) -> None:
    with pytest.raises(ShardError, match=words):
        name_shards(sources)


def test_the_lock_is_held_against_other_processes_and_dies_with_them(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom data_prep.ledger.locks import lock_output\n"
        "from data_prep.storage.store import open_folder\n"
        "with lock_output(open_folder(sys.argv[1])):\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    folder = open_folder(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputBusy, match="another run"), lock_output(folder):
            pass
        other.kill()
    with lock_output(folder):
        pass


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tmp_path)
    folder.write("f", b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match=r"No space left.*free some space.*same command again"):
        folder.write("f", b"new")
    assert folder.read("f") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_bytes_do_not_depend_on_the_order_of_arrival(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    expected = None
    for seed in (None, 1, 2):
        out = tmp_path / f"out{seed}"
        report = prepare_locally(config, world, out, codec_dir, shuffle=seed)
        assert report.counts == {"kept": 11}
        assert not any((out / "staging").iterdir())
        expected = expected or digests(out)
        assert digests(out) == expected


@pytest.mark.parametrize("stop", [1, 4, 6, 12])
def test_interrupted_anywhere_and_run_again_gives_the_same_bytes(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path, stop: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    prepare_locally(config, world, whole, codec_dir)
    prepare_locally(config, world, broken, codec_dir, shuffle=3, stop_after=stop)
    second = prepare_locally(config, world, broken, codec_dir)
    assert digests(broken) == digests(whole)
    # 11 samples and 3 closing rows in all; what was staged is not made again.
    assert second.samples_now < 14
    assert second.total == 11


def test_a_changed_shard_is_made_anew_and_a_touched_one_only_without_verify(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    shard = tmp_path / "one.tar"
    shard.write_bytes(Path(world[0]).read_bytes())
    out = tmp_path / "out"
    assert prepare_locally(config, [str(shard)], out, codec_dir).shards_now == 1
    assert prepare_locally(config, [str(shard)], out, codec_dir).shards_now == 0
    os.utime(shard, (1, 1))
    verify = config.model_copy(update={"verify": True})
    assert prepare_locally(verify, [str(shard)], out, codec_dir).shards_now == 0
    assert prepare_locally(config, [str(shard)], out, codec_dir).shards_now == 1
    shard.write_bytes(Path(world[-1]).read_bytes())
    os.utime(shard, (1, 1))
    report = prepare_locally(verify, [str(shard)], out, codec_dir)
    assert (report.shards_now, report.total) == (1, 3)
    # The clips of the old content are gone, the images of the new one are there.
    assert [p.name for p in (out / "latents").iterdir()] == ["one.1x32x32.parquet"]


def test_other_settings_are_refused_by_name(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    prepare_locally(config, world[:1], tmp_path, codec_dir)
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(SettingsChanged, match="seed: 0 → 7"):
        prepare_locally(other, world[:1], tmp_path, codec_dir)


def test_redo_makes_only_what_other_settings_made_and_hides_it_until_then(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    prepare_locally(config, world, out, codec_dir)
    other = config.model_copy(update={"seed": 7})
    prepare_locally(other, world, out, codec_dir, stop_after=9, redo=True)
    remade = {
        name.partition("/")[0] for ids in LatentDataset(out, "all").buckets.values() for name in ids
    }
    assert 0 < len(remade) < len(world)
    # Once begun, it goes on without being asked again, and the old settings are now the other ones.
    with pytest.raises(SettingsChanged, match=r"seed: 7 → 0.*--redo"):
        prepare_locally(config, world, out, codec_dir)
    prepare_locally(other, world, out, codec_dir)
    prepare_locally(other, world, fresh, codec_dir)
    assert digests(out) == digests(fresh)
    assert prepare_locally(other, world, out, codec_dir, redo=True).shards_now == 0


def test_new_captions_do_not_need_new_latents(
    config: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare_locally(config, world, tmp_path, codec_dir)
    before = digests(tmp_path)
    monkeypatch.setattr(PrepareConfig, "caption_digest", lambda self: "another captioner")
    monkeypatch.setattr(
        "data_prep.captions.measured.MeasuredCaptioner.caption",
        lambda self, frames: "Something else.",
    )

    def encode(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("flow.codec.VideoCodec.encode", encode)
    report = prepare_locally(config, world, tmp_path, codec_dir)
    assert report.counts == {"kept": 11}
    after = digests(tmp_path)
    changed = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    assert changed == {"captions", "manifests", "index.arrow"}
    dataset = LatentDataset(tmp_path, "all")
    texts = {dataset.captions(i)[1] for ids in dataset.buckets.values() for i in ids}
    assert texts == {"Something else."}


def test_a_manifest_read_and_written_again_has_the_same_bytes(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    prepare_locally(config, world, tmp_path, codec_dir)
    paths = sorted((tmp_path / "manifests").iterdir())
    manifests = list(read_manifests(open_folder(tmp_path)))
    assert [m.shard for m in manifests] == [path.stem for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        assert manifest.to_json() == path.read_bytes()
        values = json.loads(path.read_bytes())
        assert {entry["kind"] for entry in values["files"]} == {"status", "latents", "captions"}
        # A manifest of before there were such digests is read, and written as it was.
        for name in ("outcome_digest", "encode_digest", "notes"):
            del values[name]
        old = json.dumps(values, indent=1, sort_keys=True).encode()
        assert Manifest.from_json(old).to_json() == old


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"files": [{}]}', b'{"files": []}'])
def test_a_damaged_manifest_is_named_with_what_to_do(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "0.json").write_bytes(data)
    with pytest.raises(DamagedManifest, match=r"manifests/0\.json is damaged .*delete it"):
        read_manifest(open_folder(tmp_path), "0")
    assert read_manifest(open_folder(tmp_path), "1") is None
