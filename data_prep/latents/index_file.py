"""The index's file: its columns, and how they are made from the manifests.

    ROOT/index.arrow    one Arrow record batch of one row; each column is a list

Lists of one length go together:

    records   `hash` and what follows it: where each record lies, sorted by the hash of its key;
              `first`: the first record of each slot; `by_id` and `by_split`: record numbers in
              order of (bucket, id) and of (bucket, train before held out, id)
    files     `file_*`: the Parquet files of latents
    shards    `shard*`: the finished shards

An id is `SHARD/KEY/WINDOW`. The file is a function of the manifests and of the files that they
name. Where an older one stands, only shards that changed are read. Knows nothing of how a record is
looked up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.latents.records import HELD_OUT_SHARE, LatentDatasetError
from data_prep.ledger.manifest import FileEntry, Manifest
from data_prep.storage.folder import Folder, map_at_once

INDEX_NAME = "index.arrow"
INDEX_VERSION = 2
_RECORD_TYPES: dict[str, pa.DataType] = {
    "hash": pa.uint64(),
    "key": pa.large_string(),
    "window": pa.int32(),
    "file": pa.int32(),
    "group": pa.int32(),
    "row": pa.int32(),
    "caption_group": pa.int32(),
    "caption_row": pa.int32(),
}
_TYPES = {
    "first": pa.int64(),
    **_RECORD_TYPES,
    "by_id": pa.int32(),
    "by_split": pa.int32(),
    "file_shard": pa.int32(),
    "file_bucket": pa.int32(),
    "file_path": pa.large_string(),
    "file_sha256": pa.large_string(),
    "shard": pa.large_string(),
    "shard_captions": pa.large_string(),
    "shard_captions_sha256": pa.large_string(),
}
SCHEMA = pa.schema([pa.field(name, pa.large_list(of)) for name, of in _TYPES.items()])
_SHARDS_AT_ONCE = 256

Integers = npt.NDArray[np.integer[Any]]


def key_hash(key: str) -> int:
    """The first 64 bits of the key's SHA-256; all windows of a clip share it.

    >>> hex(key_hash("a"))
    '0xca978112ca1bbdca'
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def held_out(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which keys are held out, by their hashes: as `is_held_out`, which takes the first byte."""
    return (hashes >> np.uint64(56)) % np.uint64(HELD_OUT_SHARE) == 0


def slot_of(hashes: Any, count: int) -> Any:
    """The slot of a hash, or of an array of them, among `count`."""
    if isinstance(hashes, int):
        return ((hashes >> 32) * count) >> 32
    return ((hashes >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)


def as_arrow(numbers: Integers) -> pa.Array:
    """An array of numpy as one of Arrow, not copied; `pa.array` would import pandas for it."""
    numbers = np.ascontiguousarray(numbers)
    buffers = [None, pa.py_buffer(numbers)]
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), buffers)


def as_numpy(numbers: pa.Array) -> Integers:
    """The other way, and as little: `to_numpy` would import pandas."""
    dtype = np.dtype(str(numbers.type))  # int32 and so on, in both
    if not len(numbers):
        return np.empty(0, dtype=dtype)
    start = numbers.offset * dtype.itemsize
    return np.frombuffer(numbers.buffers()[1], dtype, len(numbers), start)


class Segment(NamedTuple):
    """A bucket's part of `by_id` and of `by_split`."""

    bucket: str
    train: int
    """Records of the training split; they come first in `by_split`."""
    held_out: int


@dataclass(frozen=True)
class IndexColumns:
    """The columns of an index, views of its file where that is mapped."""

    batch: pa.RecordBatch
    digest: str
    """Of the manifests that it was made from."""
    segments: tuple[Segment, ...]
    """In the order of `by_id`."""

    def numbers(self, name: str) -> Integers:
        """A column of numbers, not copied."""
        return as_numpy(self.batch.column(name).values)

    def texts(self, name: str) -> pa.LargeStringArray:
        """A column of texts, not copied."""
        return self.batch.column(name).values

    @classmethod
    def read(cls, source: pa.NativeFile) -> IndexColumns | None:
        """From a file; None where it is damaged, or of another version."""
        try:
            batch = pa.ipc.open_file(source).get_batch(0)
        except pa.ArrowInvalid:
            return None
        about = (batch.schema.metadata or {}).get(b"flowreel")
        if about is None or not batch.schema.equals(SCHEMA):
            return None
        values = json.loads(about)
        return cls(batch, values["digest"], tuple(Segment(*entry) for entry in values["segments"]))

    def write(self, sink: pa.NativeFile) -> None:
        """As `read` takes it; the same columns give the same bytes."""
        with pa.ipc.new_file(sink, self.batch.schema) as writer:
            writer.write_batch(self.batch)


@dataclass
class _Part:
    """One file of latents: its records, in order of their ids."""

    shard: str
    bucket: str
    path: str
    sha256: str
    records: pa.Table
    """Of _RECORD_TYPES, without `file`."""


@dataclass
class _Shard:
    """A finished shard: its file of captions, and its files of latents."""

    name: str
    captions: str
    captions_sha256: str
    parts: list[_Part] = field(default_factory=list)


def build_columns(
    folder: Folder, manifests: Iterator[Manifest], digest: str, old: IndexColumns | None = None
) -> IndexColumns:
    """The index of these shards.

    Args:
        folder: the dataset's.
        manifests: of the shards, in the order of their names.
        digest: of the manifests; it is kept in the file.
        old: an index of the same dataset; what it says of files that stand is taken over.

    Raises:
        LatentDatasetError: a shard's latents have no captions.
        StorageError: the disk or store fails.
    """
    reused = _Reused(old) if old is not None else None
    shards: list[_Shard] = []
    while some := list(islice(manifests, _SHARDS_AT_ONCE)):
        shards += map_at_once(lambda m: _shard_of(folder, m, reused), some, folder.threads)
    ranks = _ranks([shard.name for shard in shards])
    numbers = {shard.name: number for number, shard in enumerate(shards)}
    parts = [part for shard in shards for part in shard.parts]
    # Ids of one bucket are in order when their shards are, and in a shard those of a file are.
    order = sorted(
        range(len(parts)), key=lambda i: (parts[i].bucket, ranks[numbers[parts[i].shard]])
    )
    buckets = sorted({part.bucket for part in parts})
    columns = _sorted_records([parts[i] for i in order], order)
    segments, columns["by_split"] = _segments([parts[i] for i in order], columns)
    columns |= {
        "file_shard": [numbers[part.shard] for part in parts],
        "file_bucket": [buckets.index(part.bucket) for part in parts],
        "file_path": [part.path for part in parts],
        "file_sha256": [part.sha256 for part in parts],
        "shard": [shard.name for shard in shards],
        "shard_captions": [shard.captions for shard in shards],
        "shard_captions_sha256": [shard.captions_sha256 for shard in shards],
    }
    lists = []
    for name, of in _TYPES.items():
        column = columns[name]
        values = column if isinstance(column, pa.Array) else pa.array(column, of)
        lists.append(pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values))
    about = json.dumps({"digest": digest, "segments": segments}, sort_keys=True)
    schema = SCHEMA.with_metadata({"flowreel": about})
    return IndexColumns(pa.record_batch(lists, schema=schema), digest, segments)


def _ranks(names: Sequence[str]) -> list[int]:
    """The place of each shard in the order of ids, in which a slash follows its name."""
    order = sorted(range(len(names)), key=lambda i: f"{names[i]}/")
    ranks = [0] * len(names)
    for rank, number in enumerate(order):
        ranks[number] = rank
    return ranks


def _sorted_records(parts: Sequence[_Part], numbers: Sequence[int]) -> dict[str, Any]:
    """Columns of the records, `first`, and `by_id`.

    Args:
        parts: in order of (bucket, shard), as ids are.
        numbers: of each part's file.
    """
    types = {name: of for name, of in _RECORD_TYPES.items() if name != "file"}
    empty = pa.schema(types).empty_table()
    table = pa.concat_tables([empty, *(part.records for part in parts)])
    counts = [len(part.records) for part in parts]
    files = np.repeat(np.asarray(numbers, dtype=np.int32), counts)
    hashes = table["hash"].to_numpy()
    order = np.lexsort((files, table["window"].to_numpy(), hashes))
    table = table.append_column("file", pa.array(files)).take(pa.array(order))
    by_id = np.empty(len(order), dtype=np.int32)
    by_id[order] = np.arange(len(order), dtype=np.int32)
    slots = slot_of(hashes[order], len(order))
    first = np.searchsorted(slots, np.arange(len(order), dtype=np.uint64))
    columns: dict[str, Any] = {
        name: table[name].combine_chunks() if len(table) else pa.array([], of)
        for name, of in _RECORD_TYPES.items()
    }
    return {**columns, "first": first, "by_id": by_id}


def _segments(
    parts: Sequence[_Part], columns: dict[str, Any]
) -> tuple[tuple[Segment, ...], Integers]:
    """The segment of every bucket, and `by_split`."""
    by_id = columns["by_id"]
    is_held_out = held_out(columns["hash"].to_numpy())
    counts: dict[str, int] = {}
    for part in parts:
        counts[part.bucket] = counts.get(part.bucket, 0) + len(part.records)
    pieces, segments, start = [by_id[:0]], [], 0
    for bucket, count in counts.items():
        rows = by_id[start : start + count]
        inside = is_held_out[rows]
        pieces += [rows[~inside], rows[inside]]
        segments.append(Segment(bucket, len(pieces[-2]), len(pieces[-1])))
        start += count
    return tuple(segments), np.concatenate(pieces)


class _Reused:
    """What an older index says of files that may still stand: found by their digests."""

    def __init__(self, old: IndexColumns) -> None:
        self.old = old
        by_id = old.numbers("by_id")
        files = old.numbers("file")[by_id]
        starts = np.flatnonzero(np.diff(files, prepend=-1))
        stops = np.append(starts[1:], len(files))[: len(starts)]
        sha256s, paths = old.texts("file_sha256").to_pylist(), old.texts("file_path").to_pylist()
        shards = old.numbers("file_shard")
        captions = old.texts("shard_captions_sha256").to_pylist()
        self._rows: dict[tuple[str, str, str], Integers] = {}
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            number = int(files[start])
            key = paths[number], sha256s[number], captions[shards[number]]
            self._rows[key] = by_id[start:stop]

    def records(self, entry: FileEntry, captions: FileEntry) -> pa.Table | None:
        """The records of a file of latents; None if it, or the captions, were others."""
        if not (entry.sha256 and captions.sha256):
            return None
        rows = self._rows.get((entry.path, entry.sha256, captions.sha256))
        if rows is None:
            return None
        columns = {}
        for name in _RECORD_TYPES:
            if name == "key":
                columns[name] = self.old.texts(name).take(pa.array(rows))
            elif name != "file":
                columns[name] = pa.array(self.old.numbers(name)[rows])
        return pa.table(columns)


def _shard_of(folder: Folder, manifest: Manifest, reused: _Reused | None) -> _Shard:
    """A shard's part of the index; its files are read unless an older index knows them."""
    shard = _Shard(manifest.shard, manifest.captions.path, manifest.captions.sha256)
    places: dict[tuple[str, int], tuple[int, int]] | None = None
    for entry in manifest.latents:
        records = reused.records(entry, manifest.captions) if reused is not None else None
        if records is None:
            places = places if places is not None else _caption_places(folder, manifest)
            records = _records(folder, manifest, entry, places)
        part = _Part(manifest.shard, entry.bucket, entry.path, entry.sha256, records)
        shard.parts.append(part)
    return shard


def _caption_places(folder: Folder, manifest: Manifest) -> dict[tuple[str, int], tuple[int, int]]:
    """Row group and row of every caption of a shard, by key and window."""
    captions = _keys(folder, manifest.captions.path)
    places = zip(captions.groups.tolist(), captions.rows.tolist(), strict=True)
    return dict(zip(captions.ids(), places, strict=True))


def _records(
    folder: Folder,
    manifest: Manifest,
    entry: FileEntry,
    caption_places: dict[tuple[str, int], tuple[int, int]],
) -> pa.Table:
    """The records of a file of latents, in order of their ids."""
    latents = _keys(folder, entry.path)
    without = [key for key, window in latents.ids() if (key, window) not in caption_places]
    if without:
        raise LatentDatasetError(
            f"shard {manifest.shard!r} has latents of {without[0]!r} but no caption "
            f"({len(without)} in all); its manifest is damaged: delete it and prepare the "
            "shard again"
        )
    texts = np.array([caption_places[i] for i in latents.ids()], dtype=np.int32).reshape(-1, 2)
    columns = {
        "hash": pa.array([key_hash(key) for key in latents.keys], pa.uint64()),
        "key": pa.array(latents.keys, pa.large_string()),
        "window": pa.array(latents.windows, pa.int32()),
        "group": pa.array(latents.groups, pa.int32()),
        "row": pa.array(latents.rows, pa.int32()),
        "caption_group": pa.array(texts[:, 0]),
        "caption_row": pa.array(texts[:, 1]),
    }
    slash = pa.scalar("/", pa.large_string())
    windows = columns["window"].cast(pa.large_string())
    tails = pc.binary_join_element_wise(columns["key"], windows, slash)
    return pa.table(columns).take(pc.array_sort_indices(tails))


class _Keys(NamedTuple):
    """Every record of a Parquet file, in order."""

    keys: list[str]
    windows: list[int]
    groups: npt.NDArray[np.int32]
    """Its row group."""
    rows: npt.NDArray[np.int32]
    """Its row in the group."""

    def ids(self) -> list[tuple[str, int]]:
        """Key and window of every record."""
        return list(zip(self.keys, self.windows, strict=True))


def _keys(folder: Folder, path: str) -> _Keys:
    with folder.failing("read", path), folder.open(path) as source, pq.ParquetFile(source) as file:
        meta = file.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        table = file.read(columns=["key", "window"])
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.concatenate([np.arange(size, dtype=np.int32) for size in [0, *sizes]])
    return _Keys(table["key"].to_pylist(), table["window"].to_pylist(), groups, rows)
