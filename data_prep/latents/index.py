"""The index of a latent dataset: where the record of a key lies, found without a search.

    ROOT/index.arrow    one Arrow record batch, memory-mapped; a row per record, sorted by the key's hash

Bucket b of n holds the rows whose hash lies in [b, b+1) / n; column `first` says where it starts, so that a look-up reads two
entries of `first` and the one or two hashes between them, however many records there are. The file is a function of the manifests
alone and names their digest: where they have changed it is made anew, and replaced atomically. Knows nothing of moments or torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.storage.folder import Folder, map_at_once
from data_prep.storage.location import (
    Location,
    StorageError,
    is_uri,
)
from data_prep.storage.store import open_folder

if TYPE_CHECKING:
    from data_prep.latents.records import LatentRecord

log = logging.getLogger("flowreel.prepare")

INDEX_NAME = "index.arrow"
INDEX_VERSION = 1
_SCHEMA = pa.schema(
    [
        pa.field("first", pa.int64()),  # of bucket i, not of row i
        pa.field("hash", pa.uint64()),
        pa.field("key", pa.large_string()),
        pa.field("window", pa.int32()),
        pa.field("file", pa.int32()),
        pa.field("group", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("caption_group", pa.int32()),
        pa.field("caption_row", pa.int32()),
    ]
)


class Place(NamedTuple):
    """Where a record lies: row groups, and rows in them, of its latents and of its captions."""

    shard: str
    path: str
    """Of the Parquet file, relative to the dataset."""
    group: int
    row: int
    caption_path: str
    caption_group: int
    caption_row: int


@dataclass(frozen=True)
class IndexedFile:
    """One Parquet file of latents."""

    shard: str
    bucket: str
    path: str
    captions: str
    """The shard's caption file."""


def key_hash(key: str) -> int:
    """The first 64 bits of the key's SHA-256; all windows of a clip share it.

    >>> hex(key_hash("a"))
    '0xca978112ca1bbdca'
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


class LatentIndex:
    """Constant-time look-ups. Get one with `LatentIndex.open(root)`.

    Columns are zero-copy views of the mapped file: opening costs the manifests' digest, not memory.
    """

    def __init__(self, folder: Folder, table: pa.Table) -> None:
        self.folder = folder
        values = json.loads(table.schema.metadata[b"flowreel"])
        self.files = tuple(IndexedFile(**entry) for entry in values["files"])
        self._count = len(table)
        self._keys = table["key"]
        self._columns = {name: table[name].to_numpy() for name in _SCHEMA.names if name != "key"}

    @classmethod
    def open(cls, root: Location) -> LatentIndex:
        """Map `root/index.arrow`, made first where it is missing or other manifests than its own stand there. From an
        object store it is read whole."""
        folder = open_folder(root)
        digest = manifests_digest(folder)
        table = _mapped(folder)
        if table is None or json.loads(table.schema.metadata[b"flowreel"])["digest"] != digest:
            table = _build(folder, digest)
            try:
                folder.write(INDEX_NAME, _serialized(table))
            except StorageError as error:
                # A dataset that may not be written to is read as well, only not as quickly opened.
                log.warning("the index stays in memory: %s", error)
        return cls(folder, table)

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentIndex.open, (self.folder.location,)

    def __len__(self) -> int:
        return self._count

    def find(self, key: str, window: int = 0, shard: str | None = None) -> Place | None:
        """Where the record of (key, window) lies; None where there is none.

        Raises:
            LatentDatasetError: several shards have that key and none was named.
        """
        from data_prep.latents.records import LatentDatasetError

        found = [
            place for place in self._places(key, window) if shard is None or place.shard == shard
        ]
        if len(found) > 1:
            names = ", ".join(sorted(place.shard for place in found)[:5])
            raise LatentDatasetError(f"key {key!r} is in several shards ({names}); name one")
        return found[0] if found else None

    def get(self, key: str, window: int = 0, shard: str | None = None) -> LatentRecord:
        """The record of (key, window), read from its row group alone.

        Raises:
            LatentDatasetError: there is none, or several shards have that key and none was named.
        """
        from data_prep.latents.records import LatentDatasetError, read_record

        place = self.find(key, window, shard)
        if place is None:
            raise LatentDatasetError(
                f"no record of key {key!r}, window {window}, in {self.folder.where()}"
            )
        with self.folder.open(place.path) as source, pq.ParquetFile(source) as file:
            return read_record(file.read_row_group(place.group), place.row)

    def _places(self, key: str, window: int) -> Iterator[Place]:
        """Every shard's record of (key, window)."""
        count, wanted = len(self), key_hash(key)
        if not count:
            return
        first, hashes = self._columns["first"], self._columns["hash"]
        bucket = _bucket(wanted, count)
        low = int(first[bucket])
        high = int(first[bucket + 1]) if bucket + 1 < count else count
        inside = hashes[low:high]
        start = low + int(np.searchsorted(inside, np.uint64(wanted), side="left"))
        stop = low + int(np.searchsorted(inside, np.uint64(wanted), side="right"))
        for row in range(start, stop):
            if self._columns["window"][row] == window and self._keys[row].as_py() == key:
                yield self._place(row)

    def _place(self, row: int) -> Place:
        at = {name: int(self._columns[name][row]) for name in _SCHEMA.names[4:]}
        file = self.files[at["file"]]
        return Place(
            file.shard,
            file.path,
            at["group"],
            at["row"],
            file.captions,
            at["caption_group"],
            at["caption_row"],
        )

    def ids(self, split: str = "all") -> dict[str, list[str]]:
        """Ids (`SHARD/KEY/WINDOW`) by bucket, sorted, of a split: "train", "held_out" (1 key in 16) or "all"."""
        from data_prep.latents.records import HELD_OUT_SHARE

        by_bucket: dict[str, list[str]] = {}
        # The first byte of the hash is that of the key's SHA-256, by which `is_held_out` decides.
        held_out = (self._columns["hash"] >> np.uint64(56)) % HELD_OUT_SHARE == 0
        wanted = np.ones(len(self), bool) if split == "all" else held_out == (split == "held_out")
        rows = np.flatnonzero(wanted)
        files, windows = self._columns["file"][rows].tolist(), self._columns["window"][rows]
        keys = self._keys.take(pa.array(rows)).to_pylist() if len(rows) else []
        for key, window, number in zip(keys, windows.tolist(), files, strict=True):
            file = self.files[number]
            by_bucket.setdefault(file.bucket, []).append(f"{file.shard}/{key}/{window}")
        return {bucket: sorted(ids) for bucket, ids in by_bucket.items()}


def manifests(folder: Folder) -> Iterator[dict[str, Any]]:
    """What the finished shards' manifests say, in the order of their names.

    A shard that was made with other settings than the dataset's now (`prepare --redo`) is not finished.
    """
    from data_prep.latents.records import read_info_values

    wanted = read_info_values(folder.location)["prepare_digest"]
    names = [f"manifests/{name}" for name in folder.names("manifests")]
    for data in map_at_once(folder.read, names, folder.threads):
        manifest = json.loads(data)
        if manifest["latent_digest"] == wanted:
            yield manifest


def manifests_digest(folder: Folder) -> str:
    """Hex SHA-256 of what the manifests say of latent and caption files (their own digests among it), in order."""
    digest = hashlib.sha256(f"index {INDEX_VERSION}".encode())
    for manifest in manifests(folder):
        files = [entry for entry in manifest["files"] if entry["kind"] in ("latents", "captions")]
        digest.update(json.dumps([manifest["shard"], files], sort_keys=True).encode())
    return digest.hexdigest()


def _bucket(hashed: int, count: int) -> int:
    return ((hashed >> 32) * count) >> 32


def _mapped(folder: Folder) -> pa.Table | None:
    """The table of the index file, or None where there is none of this version."""
    if not folder.exists(INDEX_NAME):
        return None
    if is_uri(folder.location):
        source = pa.BufferReader(folder.read(INDEX_NAME))
    else:
        source = pa.memory_map(f"{folder.location}/{INDEX_NAME}")
    try:
        table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        return None
    ours = (table.schema.metadata or {}).get(b"flowreel")
    return table if ours and table.schema.equals(_SCHEMA) else None


def _serialized(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _build(folder: Folder, digest: str) -> pa.Table:
    """Read the keys of every file that a manifest names, and sort them by hash."""
    files: list[IndexedFile] = []
    parts: list[pa.Table] = []
    for manifest in manifests(folder):
        for entry, part in _shard_rows(folder, manifest, len(files)):
            files.append(entry)
            parts.append(part)
    unsorted = pa.concat_tables(parts) if parts else _SCHEMA.empty_table().drop(["first"])
    order = [(name, "ascending") for name in ("hash", "key", "window", "file")]
    table = unsorted.sort_by(order).combine_chunks()
    hashes = table["hash"].to_numpy()
    count = len(table)
    buckets = ((hashes >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
    first = np.searchsorted(buckets, np.arange(count, dtype=np.uint64))
    table = table.add_column(0, "first", pa.array(first, pa.int64()))
    values = {"digest": digest, "files": [vars(file) for file in files]}
    text = json.dumps(values, sort_keys=True)
    return table.cast(_SCHEMA).replace_schema_metadata({"flowreel": text})


def _shard_rows(
    folder: Folder, manifest: dict[str, Any], number: int
) -> Iterator[tuple[IndexedFile, pa.Table]]:
    """The latent files of a shard and, for each, its part of the index."""
    from data_prep.latents.records import LatentDatasetError

    shard = manifest["shard"]
    captions, written = "", {}
    for entry in manifest["files"]:
        if entry["kind"] == "captions":
            captions = entry["path"]
            keys, windows, groups, rows = _keys(folder, captions)
            places = zip(groups.tolist(), rows.tolist(), strict=True)
            written = dict(zip(zip(keys, windows, strict=True), places, strict=True))
    latents = [entry for entry in manifest["files"] if entry["kind"] == "latents"]
    for place, entry in enumerate(latents):
        keys, windows, groups, rows = _keys(folder, entry["path"])
        missing = [k for k, w in zip(keys, windows, strict=True) if (k, w) not in written]
        if missing:
            raise LatentDatasetError(
                f"shard {shard!r} has latents of {missing[0]!r} but no caption ({len(missing)} in all); "
                "its manifest is damaged: delete it and prepare the shard again"
            )
        texts = np.array([written[k] for k in zip(keys, windows, strict=True)]).reshape(-1, 2)
        columns = {
            "hash": pa.array([key_hash(key) for key in keys], pa.uint64()),
            "key": pa.array(keys, pa.large_string()),
            "window": pa.array(windows, pa.int32()),
            "file": pa.array(np.full(len(keys), number + place, dtype=np.int32)),
            "group": pa.array(groups, pa.int32()),
            "row": pa.array(rows, pa.int32()),
            "caption_group": pa.array(texts[:, 0], pa.int32()),
            "caption_row": pa.array(texts[:, 1], pa.int32()),
        }
        yield IndexedFile(shard, entry["bucket"], entry["path"], captions), pa.table(columns)


def _keys(
    folder: Folder, path: str
) -> tuple[list[str], list[int], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Key, window, row group, and row in it, of every record of a Parquet file."""
    with folder.failing("read", path), folder.open(path) as source, pq.ParquetFile(source) as file:
        meta = file.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        table = file.read(columns=["key", "window"])
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.concatenate([np.arange(size, dtype=np.int32) for size in [0, *sizes]])
    return table["key"].to_pylist(), table["window"].to_pylist(), groups, rows
