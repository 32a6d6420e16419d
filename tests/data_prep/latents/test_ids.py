"""Ids are numbers until they are asked for, and in the order that they always had."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from data_prep.latents.ids import Ids
from data_prep.latents.index import LatentIndex, Named
from data_prep.latents.index_file import INDEX_NAME
from data_prep.latents.records import is_held_out
from data_prep.storage.cache import cache_folder, local_copy
from data_prep.storage.store import open_folder
from tests.data_prep.handmade import write_keys
from tests.data_prep.s3_server import Store

SHARDS = ("a", "a-b", "a.b", "b", "ä", "a__0", "a0")
"""Names of which some begin another, and go on below and above a slash."""
BUCKETS = ("17x64x64", "5x32x32")


def write_awkward(root: Path, seed: int = 0) -> dict[str, list[tuple[str, str, int]]]:
    """Shards whose names, keys and windows are in another order as texts; all records by bucket."""
    rng = random.Random(seed)
    records: dict[str, list[tuple[str, str, int]]] = {bucket: [] for bucket in BUCKETS}
    for shard in SHARDS:
        ids: dict[str, list[tuple[str, int]]] = {}
        for parity, bucket in enumerate(BUCKETS):
            numbers = [2 * rng.randrange(60) + parity for _ in range(30)]
            keys = {f"{rng.choice(['k', 'k-', 'K/k', 'ü'])}{number}" for number in numbers}
            ids[bucket] = [(key, window) for key in sorted(keys) for window in (0, 2, 10)]
            records[bucket] += [(shard, key, window) for key, window in ids[bucket]]
        write_keys(root, shard, ids)
    return records


def as_texts(records: list[tuple[str, str, int]]) -> list[str]:
    return sorted(f"{shard}/{key}/{window}" for shard, key, window in records)


def test_ids_are_sorted_as_texts_in_every_split(tmp_path: Path) -> None:
    records = write_awkward(tmp_path)
    index = LatentIndex.open(tmp_path)
    for split, wanted in (("train", (False,)), ("held_out", (True,)), ("all", (False, True))):
        assert index.ids(split) == {  # type: ignore[arg-type]
            bucket: as_texts([r for r in own if is_held_out(r[1]) in wanted])
            for bucket, own in records.items()
        }


def test_ids_are_a_sequence_like_a_list_of_texts(tmp_path: Path) -> None:
    records = write_awkward(tmp_path)
    ids = LatentIndex.open(tmp_path).ids()[BUCKETS[0]]
    texts = as_texts(records[BUCKETS[0]])
    assert (ids[0], ids[-1], ids[-len(ids)]) == (texts[0], texts[-1], texts[0])
    assert ids[5:50:7] == texts[5:50:7]
    assert ids[::-1] == texts[::-1]
    assert [text for part in ids.parts(7) for text in part] == texts
    assert ids.take(np.array([3, 1])) == [texts[3], texts[1]]
    assert texts[4] in ids
    assert ids != texts[:-1]
    assert ids != [*texts[:-1], "another"]
    assert pickle.loads(pickle.dumps(ids[:9])) == texts[:9]
    for at in (len(ids), -len(ids) - 1):
        with pytest.raises(IndexError):
            ids[at]


def test_many_records_are_found_as_each_is_alone(tmp_path: Path) -> None:
    records = [record for own in write_awkward(tmp_path).values() for record in own]
    index = LatentIndex.open(tmp_path)
    asked = [*records[::5], ("a", "no such key", 0), ("no such shard", records[0][1], 0)]
    shards, keys, windows = zip(*asked, strict=True)
    alone = [index.row(key, window, shard) for shard, key, window in asked]
    found = index.rows_of(Named(shards, keys, windows))
    assert found.tolist() == sorted(row for row in alone if row is not None)
    assert len(found) == len(asked) - 2
    assert Ids(index, found) == index.names(found)
    assert not len(index.rows_of(Named([], [], [])))


def test_an_index_made_from_an_older_one_reads_only_shards_that_changed(tmp_path: Path) -> None:
    write_awkward(tmp_path)
    LatentIndex.open(tmp_path)
    changed = {BUCKETS[0]: [("new", 0), ("newer", 1)], "1x8x8": [("image", 0)]}
    write_keys(tmp_path, "a-b", changed)
    write_keys(tmp_path, "c", {BUCKETS[1]: [("k1", 0)]})
    (tmp_path / "manifests" / "b.json").unlink()
    # What is not to be read cannot be read.
    kept = {}
    for path in [*tmp_path.glob("latents/*"), *tmp_path.glob("captions/*")]:
        if not path.name.startswith(("a-b.", "c.")):
            kept[path] = path.read_bytes()
            path.write_bytes(b"no Parquet file")
    LatentIndex.open(tmp_path)
    made_from_older = (tmp_path / INDEX_NAME).read_bytes()
    for path, content in kept.items():
        path.write_bytes(content)
    (tmp_path / INDEX_NAME).unlink()
    LatentIndex.open(tmp_path)
    assert (tmp_path / INDEX_NAME).read_bytes() == made_from_older


def test_a_store_s_index_is_copied_once_and_anew_when_it_changes(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = tmp_path / "local"
    write_awkward(local)
    expected = LatentIndex.open(local).ids()
    for path in local.rglob("*"):
        if path.is_file():
            store.upload(path, f"ids/{path.relative_to(local)}")
    uri = store.uri("ids")
    assert LatentIndex.open(uri).ids() == expected
    (copy,) = (path for path in cache_folder().iterdir() if path.suffix == ".arrow")
    assert copy.read_bytes() == (local / INDEX_NAME).read_bytes()
    sent = store.gate.sent_bytes
    assert len(LatentIndex.open(uri)) == sum(map(len, expected.values()))
    assert store.gate.sent_bytes - sent < copy.stat().st_size
    # A copy that lost its end is none.
    copy.write_bytes(copy.read_bytes()[:100])
    assert LatentIndex.open(uri).ids() == expected
    write_keys(local, "c", {BUCKETS[0]: [("new", 0)]})
    opened = LatentIndex.open(uri)
    for kind, base in (
        ("latents", f"c.{BUCKETS[0]}.parquet"),
        ("captions", "c.parquet"),
        ("manifests", "c.json"),
    ):
        store.upload(local / kind / base, f"ids/{kind}/{base}")
    assert LatentIndex.open(uri).ids() == LatentIndex.open(local).ids()
    assert len([path for path in cache_folder().iterdir() if path.suffix == ".arrow"]) == 1
    # Who has the older copy mapped keeps it.
    assert opened.ids() == expected


def test_without_room_for_a_copy_the_index_is_read_into_memory(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    local = tmp_path / "local"
    write_keys(local, "s", {BUCKETS[0]: [("k", 0)]})
    LatentIndex.open(local)
    for path in local.rglob("*"):
        if path.is_file():
            store.upload(path, f"nocache/{path.relative_to(local)}")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert LatentIndex.open(store.uri("nocache")).find("k") is not None
    assert "read into memory" in caplog.text
    assert local_copy(open_folder(store.uri("nocache")), "no such file") is None
