"""Manifests folded into one file say what they said one by one, whatever is killed on the way."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.latents.index import manifests_digest
from data_prep.latents.index_file import INDEX_NAME
from data_prep.ledger import manifest as manifests
from data_prep.ledger.errors import DamagedManifest
from data_prep.ledger.manifest import (
    FOLDED_FROM,
    FileEntry,
    Manifest,
    Manifests,
    fold_manifests,
    read_manifest,
    read_manifests,
    remove_manifest,
    write_manifest,
)
from data_prep.ledger.manifest_file import MANIFEST_FILE
from data_prep.storage.folder import Folder, LocalFolder
from data_prep.storage.store import open_folder
from tests.data_prep.in_process import digests, prepare_locally
from tests.data_prep.ledger.test_resuming import Killed, Undertaker, made_rows, sink_all
from tests.data_prep.s3_server import Store

COUNT = FOLDED_FROM + 6


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is large."""
    monkeypatch.setattr(manifests, "FOLDED_FROM", 1)
    monkeypatch.setattr("data_prep.run.FOLDED_FROM", 1)


def manifest(number: int, content: str = "") -> Manifest:
    name = f"{number:05d}"
    files = (
        FileEntry("status", f"status/{name}.parquet", 2, f"s{content}{name}"),
        FileEntry("captions", f"captions/{name}.parquet", 2, f"c{content}{name}"),
    )
    return Manifest(
        shard=name, source=f"{name}.tar", fingerprint="f", job="j", latent_digest="aa",
        caption_digest="bb", num_samples=2, truncated=False, ignored_members=0, error="",
        sha256="", counts={"kept": 2}, reasons={}, files=files,
    )  # fmt: skip


def written(root: Path, numbers: Iterator[int] | range) -> LocalFolder:
    folder = LocalFolder(root)
    folder.write("dataset.json", b'{"version": 1, "prepare_digest": "aa"}')
    for number in numbers:
        write_manifest(folder, manifest(number))
    return folder


def said(folder: Folder) -> list[Manifest]:
    """What all ways of reading say, if they agree."""
    found = list(read_manifests(folder))
    names = [m.shard for m in found]
    opened = Manifests(folder)
    assert [opened.get(name) for name in names] == found
    assert [read_manifest(folder, name) for name in names] == found
    assert list(opened.heads()) == [m.head for m in found]
    assert [(row.head, Manifest.from_json(row.data)) for row in opened.rows()] == [
        (m.head, m) for m in found
    ]
    return found


def test_folded_manifests_say_what_they_said_one_by_one(tmp_path: Path) -> None:
    folder = written(tmp_path, range(COUNT))
    before, digest = said(folder), manifests_digest(folder)
    fold_manifests(folder)
    assert not folder.names("manifests")
    assert said(folder) == before
    assert manifests_digest(folder) == digest
    assert read_manifest(folder, "no such shard") is None
    assert list(read_manifests(folder, ["00007", "no such shard", "00003"])) == [
        before[7],
        before[3],
    ]


def test_a_small_output_keeps_its_manifests_one_by_one(tmp_path: Path) -> None:
    folder = written(tmp_path, range(FOLDED_FROM - 1))
    before = digests(tmp_path)
    fold_manifests(folder)
    assert digests(tmp_path) == before


def test_the_file_does_not_depend_on_what_was_folded_when(tmp_path: Path) -> None:
    once = written(tmp_path / "once", range(COUNT))
    fold_manifests(once)
    numbers = list(range(COUNT))
    random.Random(0).shuffle(numbers)
    often = written(tmp_path / "often", iter(numbers[:FOLDED_FROM]))
    fold_manifests(often)
    write_manifest(often, manifest(numbers[0], "another try "))
    remove_manifest(often, manifest(numbers[1]).shard)
    fold_manifests(often)
    written(tmp_path / "often", iter(numbers[FOLDED_FROM:]))
    for number in numbers[:2]:
        write_manifest(often, manifest(number))
    fold_manifests(often)
    assert digests(tmp_path / "often") == digests(tmp_path / "once")


def test_a_manifest_of_its_own_wins_and_a_removed_one_does_not_count(tmp_path: Path) -> None:
    folder = written(tmp_path, range(COUNT))
    fold_manifests(folder)
    write_manifest(folder, manifest(3, "new "))
    remove_manifest(folder, "00005")
    expected = [manifest(n) for n in range(COUNT) if n != 5]
    expected[3] = manifest(3, "new ")
    assert said(folder) == expected
    assert read_manifest(folder, "00005") is None
    fold_manifests(folder)
    assert said(folder) == expected
    assert not folder.names("manifests")
    remove_manifest(folder, "00005")
    assert not folder.names("manifests"), "what is in neither place leaves no trace"


def test_who_reads_while_manifests_are_folded_misses_none(tmp_path: Path) -> None:
    folder = written(tmp_path, range(COUNT))
    before = said(folder)
    opened = Manifests(folder)
    reading = opened.read()
    first = next(reading)
    fold_manifests(folder)
    assert [first, *reading] == before
    assert list(opened.heads()) == [m.head for m in before]


@pytest.mark.usefixtures("folded")
def test_folding_killed_anywhere_loses_nothing(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", range(5))
    before = said(whole)
    fold_manifests(whole)
    points = 0
    while True:
        folder = written(tmp_path / f"out{points}", range(5))
        with pytest.MonkeyPatch.context() as patch:
            undertaker = Undertaker(patch, operations=points + 1)
            try:
                fold_manifests(folder)
            except Killed:
                undertaker.operations = 1 << 30
            else:
                break
        assert said(folder) == before
        fold_manifests(folder)
        folder.remove_partials()
        assert digests(tmp_path / f"out{points}") == digests(tmp_path / "whole")
        points += 1
    assert points > 3


def test_a_removal_cut_short_leaves_the_folded_ones(tmp_path: Path) -> None:
    folder = written(tmp_path, range(COUNT))
    fold_manifests(folder)
    written(tmp_path, range(0, COUNT, 3))
    assert said(folder) == [manifest(n) for n in range(COUNT)]


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = written(tmp_path, range(COUNT))
    fold_manifests(folder)
    whole = folder.read(MANIFEST_FILE)
    for data in (b"", whole[: len(whole) // 2]):
        folder.write(MANIFEST_FILE, data)
        with pytest.raises(DamagedManifest, match=r"manifests\.parquet is damaged .*put a copy"):
            Manifests(folder)
        with pytest.raises(DamagedManifest, match=r"manifests\.parquet is damaged"):
            read_manifest(folder, "00001")


@pytest.mark.usefixtures("folded")
def test_a_store_folds_as_a_disk_does(tmp_path: Path, store: Store) -> None:
    local = written(tmp_path, range(5))
    remote = open_folder(store.uri("folded"))
    for number in range(5):
        write_manifest(remote, manifest(number))
    remote.write("dataset.json", local.read("dataset.json"))
    for folder in (local, remote):
        fold_manifests(folder)
    assert remote.read(MANIFEST_FILE) == local.read(MANIFEST_FILE)
    assert not remote.names("manifests")
    remove_manifest(remote, "00002")
    assert said(remote) == [manifest(n) for n in range(5) if n != 2]


@pytest.mark.usefixtures("folded")
def test_a_folded_output_is_resumed_as_one_that_is_not(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    prepare_locally(config, world, whole, codec_dir)
    assert not (whole / "manifests").exists()
    assert len(list(read_manifests(open_folder(whole)))) == 3
    prepare_locally(config, world[:2], broken, codec_dir)
    prepare_locally(config, world, broken, codec_dir, shuffle=3, stop_after=2)
    report = prepare_locally(config, world, broken, codec_dir)
    assert (report.total, report.shards) == (11, 3)
    assert digests(broken) == digests(whole)
    assert prepare_locally(config, world, broken, codec_dir).shards_now == 0
    assert digests(broken) == digests(whole)


@pytest.mark.usefixtures("folded")
def test_killed_while_a_folded_shard_is_made_anew(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    """Between the old shard and the new one readers see none, and never a mixture."""
    shard = tmp_path / "in" / "one.tar"
    shard.parent.mkdir()
    shutil.copy(world[0], shard)
    before = tmp_path / "before"
    prepare_locally(config, [str(shard)], before, codec_dir)
    shutil.copy(world[-1], shard)
    rows = made_rows(config, [str(shard)], codec_dir, tmp_path / "scratch")
    whole = tmp_path / "whole"
    prepare_locally(config, [str(shard)], whole, codec_dir)
    lengths, points = set(), 0
    while True:
        out = tmp_path / f"out{points}"
        shutil.copytree(before, out)
        (out / INDEX_NAME).unlink()
        with pytest.MonkeyPatch.context() as patch:
            undertaker = Undertaker(patch, operations=points + 1)
            try:
                sink_all(config, [str(shard)], codec_dir, out, rows)
            except Killed:
                undertaker.operations = 1 << 30
            else:
                break
        lengths.add(len(LatentDataset(out, "all")))
        sink_all(config, [str(shard)], codec_dir, out, rows)
        fold_manifests(open_folder(out))
        assert len(LatentDataset(out, "all")) == 3
        assert digests(out) == digests(whole), f"killed at disk operation {points + 1}"
        shutil.rmtree(out)
        points += 3
    assert lengths == {4, 0, 3}
