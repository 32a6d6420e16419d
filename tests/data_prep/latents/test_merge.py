"""Datasets merged are what one run over all their shards makes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.latents.index import LatentIndex
from data_prep.latents.merge import MergeError, merge_latents
from data_prep.ledger.manifest import MANIFESTS, read_manifests
from data_prep.storage.location import StorageError
from data_prep.storage.store import open_folder
from tests.data_prep.handmade import write_keys
from tests.data_prep.in_process import digests, prepare_locally
from tests.data_prep.ledger.test_resuming import Killed, Undertaker
from tests.data_prep.s3_server import Store
from tests.pipeline.command import flowreel, refused

BUCKET = "5x32x32"


@pytest.fixture(scope="module")
def pair(
    config: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Halves `a` and `b` of the shards, and `whole`, all prepared."""
    root = tmp_path_factory.mktemp("pair")
    for name, shards in (("a", world[:2]), ("b", world[2:]), ("whole", world)):
        prepare_locally(config, shards, root / name, codec_dir)
    return root


def test_two_halves_merged_are_the_run_over_all(pair: Path, tmp_path: Path) -> None:
    report = merge_latents([pair / "a", pair / "b"], tmp_path / "c")
    assert digests(tmp_path / "c") == digests(pair / "whole")
    assert (report.shards, report.records, report.shards_now) == (3, 11, 3)
    assert report.files == {"linked": 9, "copied": 0, "streamed": 0}
    merged, whole = (LatentDataset(root, "all") for root in (tmp_path / "c", pair / "whole"))
    assert merged.buckets == whole.buckets
    for ids in whole.buckets.values():
        one, other = merged.load(ids), whole.load(ids)
        assert one.mean_BTCHW.equal(other.mean_BTCHW)
        assert (one.captions, one.synthetic) == (other.captions, other.synthetic)
    again = merge_latents([pair / "a", pair / "b"], tmp_path / "c")
    assert (again.shards, again.shards_now) == (3, 0)
    # The order of the datasets does not matter, nor does one that is in another.
    merge_latents([pair / "b", pair / "whole", pair / "a"], tmp_path / "d")
    assert digests(tmp_path / "d") == digests(pair / "whole")


def test_a_merged_dataset_is_prepared_further(
    config: PrepareConfig, world: list[str], codec_dir: Path, pair: Path, tmp_path: Path
) -> None:
    """What is written anew takes the place of a link, and leaves the file of the source."""
    before = digests(pair / "a")
    merge_latents([pair / "a", pair / "b"], tmp_path / "c")
    assert prepare_locally(config, world, tmp_path / "c", codec_dir).shards_now == 0
    other = config.model_copy(update={"seed": 7})
    prepare_locally(other, world, tmp_path / "c", codec_dir, redo=True)
    assert digests(pair / "a") == before


def test_killed_anywhere_and_run_again_gives_the_same_bytes(pair: Path, tmp_path: Path) -> None:
    points = 0
    while True:
        out = tmp_path / f"out{points}"
        with pytest.MonkeyPatch.context() as patch:
            undertaker = Undertaker(patch, operations=points + 1)
            try:
                merge_latents([pair / "a", pair / "b"], out)
            except Killed:
                undertaker.operations = 1 << 30
            else:
                break
        merge_latents([pair / "a", pair / "b"], out)
        assert digests(out) == digests(pair / "whole"), f"killed at disk operation {points + 1}"
        points += 5
    assert points > 30


def test_shards_of_one_name_are_named_as_one_run_names_them(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    shards = []
    for name, source in (("x", world[0]), ("y", world[-1])):
        folder = tmp_path / name
        folder.mkdir()
        shards.append(str(shutil.copy(source, folder / "00000.tar")))
        prepare_locally(config, shards[-1:], tmp_path / f"out-{name}", codec_dir)
    prepare_locally(config, shards, tmp_path / "whole", codec_dir)
    halves = [tmp_path / "out-x", tmp_path / "out-y"]
    report = merge_latents(halves, tmp_path / "c")
    assert report.renamed == {shards[0]: "x__00000", shards[1]: "y__00000"}
    assert digests(tmp_path / "c") == digests(tmp_path / "whole")
    assert merge_latents(halves, tmp_path / "c").shards_now == 0
    assert prepare_locally(config, shards, tmp_path / "c", codec_dir).shards_now == 0


def test_stores_and_disks_merge_alike(pair: Path, tmp_path: Path, store: Store) -> None:
    for name in ("a", "b"):
        for path in (pair / name).rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                store.upload(path, f"merge/{name}/{path.relative_to(pair / name)}")
    a, b = store.uri("merge/a"), store.uri("merge/b")
    expected = digests(pair / "whole")
    for out, ways in (
        (store.uri("merge/c"), {"linked": 0, "copied": 9, "streamed": 0}),
        (str(tmp_path / "local"), {"linked": 0, "copied": 0, "streamed": 9}),
    ):
        assert merge_latents([a, b], out).files == ways
    assert digests(tmp_path / "local") == expected
    mixed = merge_latents([pair / "a", b], store.uri("merge/d"))
    assert mixed.files == {"linked": 0, "copied": 3, "streamed": 6}
    for name in ("c", "d"):
        for base, content in store.files(f"merge/{name}").items():
            target = tmp_path / name / base
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        assert digests(tmp_path / name) == expected


def test_where_nothing_can_be_linked_files_are_copied_and_looked_at(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    report = merge_latents([pair / "a", pair / "b"], tmp_path / "c")
    assert report.files == {"linked": 0, "copied": 0, "streamed": 9}
    assert digests(tmp_path / "c") == digests(pair / "whole")
    damaged = tmp_path / "damaged"
    shutil.copytree(pair / "a", damaged)
    path = next(damaged.glob("latents/*"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match="other bytes than its manifest says"):
        merge_latents([damaged, pair / "b"], tmp_path / "d")


def test_datasets_that_are_not_alike_are_refused_by_what_differs(
    config: PrepareConfig, world: list[str], codec_dir: Path, pair: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair / "b", other)
    info = json.loads((other / "dataset.json").read_text())
    info["codec_digest"], info["settings"]["seed"] = "another", 7
    (other / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(MergeError, match=r"codec_digest: .* → 'another', settings\.seed: 0 → 7"):
        merge_latents([pair / "a", other], tmp_path / "c")
    shutil.rmtree(other)
    shutil.copytree(pair / "b", other)
    for path in (other / MANIFESTS).iterdir():
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "caption_digest": "another"}))
    recipe = json.loads((other / "prepare.json").read_text())
    recipe["captioner"]["backend"] = "vlm"
    (other / "prepare.json").write_text(json.dumps(recipe))
    with pytest.raises(MergeError, match=r"captioner\.backend: 'auto' → 'vlm'.*only captions"):
        merge_latents([pair / "a", other], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_wrong_place_is_refused(pair: Path, tmp_path: Path) -> None:
    a, b = pair / "a", pair / "b"
    for sources, out, words in (
        ([a], tmp_path / "c", "1 datasets are given"),
        ([a, a], tmp_path / "c", "1 datasets are given"),
        ([a, b], a, "is one of the datasets"),
        ([a, b], tmp_path / "other", "holds shards that none of the datasets has"),
    ):
        if out.name == "other":
            shutil.copytree(pair / "whole", out)
            (path,) = out.glob("manifests/00000.json")
            path.write_text(path.read_text().replace('"shard": "00000"', '"shard": "elsewhere"'))
            path.rename(path.with_name("elsewhere.json"))
        with pytest.raises(MergeError, match=words):
            merge_latents(sources, out)


def test_one_shard_prepared_twice_from_other_content_is_refused(tmp_path: Path) -> None:
    for name, key in (("a", "k"), ("b", "other")):
        write_keys(tmp_path / name, "s", {BUCKET: [(key, 0)]})
    with pytest.raises(MergeError, match=r"shard 's' of s\.tar was prepared twice"):
        merge_latents([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for name in ("a", "b"):
        write_keys(tmp_path / name, name, {BUCKET: [("k", 0)]})
    for path in ("latents/../../secret", "../secret", "/etc/passwd", "captions/a.parquet"):
        manifest = tmp_path / "a" / MANIFESTS / "a.json"
        values = json.loads(manifest.read_text())
        values["files"][1]["path"] = path
        manifest.write_text(json.dumps(values))
        with pytest.raises(MergeError, match="which is no file of latents"):
            merge_latents([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_only_finished_shards_of_the_settings_are_merged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_keys(tmp_path / name, name, {BUCKET: [(name, 0)]})
        write_keys(tmp_path / name, f"old-{name}", {BUCKET: [("old", 0)]}, "other settings")
        write_keys(tmp_path / name, name, {BUCKET: [(name, 0)]})
    for folder in (tmp_path / "a", tmp_path / "b"):
        for kind in ("status", "latents", "captions"):
            (folder / kind).mkdir(exist_ok=True)
        (folder / "status" / f"{folder.name}.parquet").touch()
    merge_latents([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert [m.shard for m in read_manifests(open_folder(tmp_path / "c"))] == ["a", "b"]
    assert LatentIndex.open(tmp_path / "c").ids() == {BUCKET: ["a/a/0", "b/b/0"]}


def test_the_command_says_what_it_did_and_refuses_in_one_line(tmp_path: Path) -> None:
    for name, shard in (("a", "0"), ("b", "1")):
        write_keys(tmp_path / name, shard, {BUCKET: [(name, 0)]})
        (tmp_path / name / "status").mkdir()
        (tmp_path / name / "status" / f"{shard}.parquet").touch()
    places = [str(tmp_path / name) for name in ("a", "b", "c")]
    command = ("merge-latents", *places[:2], "--out", places[2], "--json")
    for shards_now, linked in ((2, 6), (0, 0)):
        ended = flowreel(*command)
        assert ended.returncode == 0, ended.stderr
        said = json.loads(ended.stdout)
        assert (said["shards"], said["records"], said["shards_now"]) == (2, 2, shards_now)
        assert said["files"]["linked"] == linked
    write_keys(tmp_path / "b", "1", {BUCKET: [("b", 0)]}, "other settings")
    refusal = refused("merge-latents", *places[:2], "--out", places[2])
    assert "were not prepared alike (prepare_digest: 'd' → 'other settings')" in refusal
