"""A record is found by its key in constant time, in an index that the manifests alone decide."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.index import LatentIndex, current_manifests
from data_prep.latents.index_file import INDEX_NAME, build_columns
from data_prep.latents.records import (
    FORMAT_VERSION,
    Bucket,
    LatentDatasetError,
)
from data_prep.storage.store import open_folder
from tests.data_prep.handmade import captions_entry, latents_entry, write_handmade_manifest
from tests.data_prep.latents.test_dataset import moments, write_dataset


class Counted:
    """An array that counts the elements that are read of it, those of a slice whole."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.read = values, 0

    def __getitem__(self, at: int | slice) -> np.ndarray:
        elements = self.values[at]
        self.read += np.size(elements)
        return elements


def synthetic_index(tmp_path: Path, count: int) -> LatentIndex:
    """An index of `count` keys without the records behind it."""
    (tmp_path / "latents").mkdir(parents=True)
    keys = [f"{n:09d}" for n in range(count)]
    table = pa.table({"key": keys, "window": pa.array(np.zeros(count, np.int32))})
    pq.write_table(table, tmp_path / "latents" / "s.5x32x32.parquet", row_group_size=64)
    path = "latents/s.5x32x32.parquet"
    entries = latents_entry(path, "5x32x32"), captions_entry(path)
    write_handmade_manifest(tmp_path, "s", "d", *entries)
    info = {"version": FORMAT_VERSION, "prepare_digest": "d"}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    return LatentIndex.open(tmp_path)


def elements_read(index: LatentIndex, number: int) -> int:
    """How many elements of all columns one look-up reads."""
    columns = {name: Counted(values) for name, values in index._columns.items()}
    index._columns, before = columns, index._columns  # type: ignore[assignment]
    place = index.find(f"{number:09d}")
    index._columns = before
    assert place is not None
    assert (place.group, place.row) == (number // 64, number % 64)
    return sum(column.read for column in columns.values())


def test_a_look_up_reads_as_little_of_a_large_index_as_of_a_small_one(tmp_path: Path) -> None:
    small, large = (synthetic_index(tmp_path / str(n), n) for n in (200, 50_000))
    reads = {
        len(index): [elements_read(index, n * len(index) // 200) for n in range(200)]
        for index in (small, large)
    }
    means = {count: np.mean(counts) for count, counts in reads.items()}
    # Ten columns and entries for the record itself, and on average two hashes of its slot.
    assert all(mean < 12 for mean in means.values()), means
    assert max(reads[50_000]) <= 24
    assert large.find("no such key") is None


def test_the_index_is_mapped_not_read(tmp_path: Path) -> None:
    synthetic_index(tmp_path, 50_000)
    before = pa.total_allocated_bytes()
    index = LatentIndex.open(tmp_path)
    assert (tmp_path / INDEX_NAME).stat().st_size > 2_000_000
    assert pa.total_allocated_bytes() - before < 10_000
    assert index.find("000049999") is not None


def test_every_record_is_found_with_its_own_numbers(tmp_path: Path) -> None:
    keys = write_dataset(tmp_path)
    index = LatentIndex.open(tmp_path)
    assert len(index) == len(keys)
    for number, key in enumerate(keys):
        frames = 1 if number % 2 else 5
        record = index.get(key)
        assert (record.key, record.window, record.number) == (key, 0, number)
        assert record.bucket == Bucket(frames, 32, 32)
        np.testing.assert_array_equal(record.mean, moments(number, frames))
        np.testing.assert_array_equal(record.logvar, moments(1000 + number, frames))
    assert LatentDataset(tmp_path, "all").get(f"s/{keys[3]}/0").number == 3
    with pytest.raises(LatentDatasetError, match="no record of key 'k000', window 1"):
        index.get("k000", 1)


def test_an_index_is_made_anew_only_where_the_manifests_changed(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    LatentIndex.open(tmp_path)
    path = tmp_path / INDEX_NAME
    first, inode = path.read_bytes(), path.stat().st_ino
    LatentIndex.open(tmp_path)
    assert path.stat().st_ino == inode
    write_dataset(tmp_path, count=80)
    manifest = tmp_path / "manifests" / "s.json"
    values = json.loads(manifest.read_text())
    values["files"][1]["sha256"] = "another"
    manifest.write_text(json.dumps(values))
    assert len(LatentIndex.open(tmp_path)) == 80
    assert path.stat().st_ino != inode
    other = tmp_path / "copy"
    write_dataset(other)
    LatentIndex.open(other)
    assert (other / INDEX_NAME).read_bytes() == first
    # A damaged file is no index.
    path.write_bytes(first[:1000])
    assert len(LatentIndex.open(tmp_path)) == 80


def test_a_key_of_several_shards_must_be_told_apart(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    for kind in ("latents", "captions"):
        for path in (tmp_path / kind).glob("s.*"):
            shutil.copy(path, path.with_name(path.name.replace("s.", "t.", 1)))
    text = (tmp_path / "manifests" / "s.json").read_text()
    text = text.replace('"s"', '"t"').replace("/s.", "/t.")
    (tmp_path / "manifests" / "t.json").write_text(text)
    index = LatentIndex.open(tmp_path)
    with pytest.raises(LatentDatasetError, match=r"several shards \(s, t\)"):
        index.find("k000")
    place = index.find("k000", 0, "t")
    assert place is not None
    assert place.path == "latents/t.5x32x32.parquet"
    assert len(LatentDataset(tmp_path, "all")) == 120


def test_an_index_travels_and_an_empty_dataset_has_one(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    index = pickle.loads(pickle.dumps(LatentIndex.open(tmp_path)))
    assert index.find("k001") is not None
    (tmp_path / "manifests" / "s.json").unlink()
    assert len(LatentIndex.open(tmp_path)) == 0
    assert LatentIndex.open(tmp_path).find("k001") is None


def test_latents_without_captions_are_a_damaged_shard(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "captions" / "s.parquet"
    pq.write_table(pq.read_table(path).slice(3), path)
    with pytest.raises(LatentDatasetError, match=r"'k000' but no caption \(2 in all\)"):
        LatentIndex.open(tmp_path)


def test_a_read_only_dataset_is_read_without_keeping_the_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in the index file's place fails the rename, whoever runs the test."""
    write_dataset(tmp_path)
    (tmp_path / INDEX_NAME).mkdir()
    with caplog.at_level(logging.WARNING, "flowreel.prepare"):
        assert LatentIndex.open(tmp_path).find("k001") is not None
    assert "stays in memory" in caplog.text
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_rows_are_in_order_of_their_hashes(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    folder = open_folder(tmp_path)
    columns = build_columns(folder, current_manifests(folder), "")
    hashes, first = columns.numbers("hash"), columns.numbers("first")
    assert (np.diff(hashes.astype(np.float64)) >= 0).all()
    assert (np.diff(first) >= 0).all()
    keys = columns.texts("key").to_pylist()
    assert keys != sorted(keys)
