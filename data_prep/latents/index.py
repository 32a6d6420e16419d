"""The index of a latent dataset: where the record of a key lies, found without a search.

    ROOT/index.arrow    one Arrow record batch, memory-mapped; a row per record, sorted by key hash

Slot b of n holds the rows whose hash lies in [b, b+1) / n, and column `first` says where it starts.
So a look-up reads two entries of `first` and the one or two hashes between them, however many
records there are. The file is a function of the manifests alone and names their digest: if they
have changed, it is made anew and replaced whole. Knows nothing of Ray or torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.latents.records import (
    HELD_OUT_SHARE,
    LatentDatasetError,
    LatentRecord,
    read_info_values,
    read_record,
)
from data_prep.ledger.manifest import Manifest, read_manifests
from data_prep.storage.folder import Folder
from data_prep.storage.location import Location, StorageError, is_uri
from data_prep.storage.store import open_folder

log = logging.getLogger("flowreel.prepare")

INDEX_NAME = "index.arrow"
INDEX_VERSION = 1
_SCHEMA = pa.schema(
    [
        pa.field("first", pa.int64()),  # the first row of slot i, not about row i
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
    """The file of latents, relative to the dataset."""
    group: int
    row: int
    """In the row group."""
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
    """Look-ups in constant time. Get one with `LatentIndex.open(root)`.

    Columns are views of the mapped file: opening costs the digest of the manifests, not memory.

        index = LatentIndex.open("/data/latents")
        index.find("clip0007", window=0).path    # 'latents/00000.17x64x64.parquet'
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
        """Map `root/index.arrow`; from an object store it is read whole.

        The index is made first if there is none, or if the manifests have changed since.

        Raises:
            LatentDatasetError: no dataset there, or a damaged one.
        """
        folder = open_folder(root)
        digest = manifests_digest(folder)
        table = _mapped(folder)
        if table is None or json.loads(table.schema.metadata[b"flowreel"])["digest"] != digest:
            table = _build(folder, digest)
            try:
                folder.write(INDEX_NAME, _serialized(table))
            except StorageError as error:
                # A dataset that may not be written to is read as well; it only opens more slowly.
                log.warning("the index stays in memory: %s", error)
        return cls(folder, table)

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentIndex.open, (self.folder.location,)

    def __len__(self) -> int:
        return self._count

    def find(self, key: str, window: int = 0, shard: str | None = None) -> Place | None:
        """Where the record of (key, window) lies; None if there is none.

        Raises:
            LatentDatasetError: several shards have that key and none was named.
        """
        places = [
            place for place in self._places(key, window) if shard is None or place.shard == shard
        ]
        if len(places) > 1:
            names = ", ".join(sorted(place.shard for place in places)[:5])
            raise LatentDatasetError(f"key {key!r} is in several shards ({names}); name one")
        return places[0] if places else None

    def get(self, key: str, window: int = 0, shard: str | None = None) -> LatentRecord:
        """The record of (key, window), read from its row group alone.

        Raises:
            LatentDatasetError: there is none, or several shards have that key and none was named.
        """
        place = self.find(key, window, shard)
        if place is None:
            raise LatentDatasetError(
                f"no record of key {key!r}, window {window}, in {self.folder.where()}"
            )
        with self.folder.open(place.path) as source, pq.ParquetFile(source) as file:
            return read_record(file.read_row_group(place.group), place.row)

    def _places(self, key: str, window: int) -> Iterator[Place]:
        """Every shard's record of (key, window)."""
        count, hashed = len(self), key_hash(key)
        if not count:
            return
        first, hashes = self._columns["first"], self._columns["hash"]
        slot = _slot(hashed, count)
        low = int(first[slot])
        high = int(first[slot + 1]) if slot + 1 < count else count
        inside = hashes[low:high]
        start = low + int(np.searchsorted(inside, np.uint64(hashed), side="left"))
        stop = low + int(np.searchsorted(inside, np.uint64(hashed), side="right"))
        for row in range(start, stop):
            if self._columns["window"][row] == window and self._keys[row].as_py() == key:
                yield self._place(row)

    def _place(self, row: int) -> Place:
        def entry(name: str) -> int:
            return int(self._columns[name][row])

        file = self.files[entry("file")]
        return Place(
            shard=file.shard,
            path=file.path,
            group=entry("group"),
            row=entry("row"),
            caption_path=file.captions,
            caption_group=entry("caption_group"),
            caption_row=entry("caption_row"),
        )

    def ids(self, split: str = "all") -> dict[str, list[str]]:
        """Ids (`SHARD/KEY/WINDOW`) by bucket, sorted.

        Args:
            split: "train", "held_out" (one key in HELD_OUT_SHARE) or "all".
        """
        by_bucket: dict[str, list[str]] = {}
        # The first byte of the hash is that of the key's SHA-256, by which `is_held_out` decides.
        held_out = (self._columns["hash"] >> np.uint64(56)) % HELD_OUT_SHARE == 0
        inside = np.ones(len(self), bool) if split == "all" else held_out == (split == "held_out")
        rows = np.flatnonzero(inside)
        files, windows = self._columns["file"][rows].tolist(), self._columns["window"][rows]
        keys = self._keys.take(pa.array(rows)).to_pylist() if len(rows) else []
        for key, window, number in zip(keys, windows.tolist(), files, strict=True):
            file = self.files[number]
            by_bucket.setdefault(file.bucket, []).append(f"{file.shard}/{key}/{window}")
        return {bucket: sorted(ids) for bucket, ids in by_bucket.items()}


def current_manifests(folder: Folder) -> Iterator[Manifest]:
    """The manifests of the finished shards, in the order of their names.

    A shard made with other settings than the dataset's now (`prepare --redo`) is not finished.
    """
    latent_digest = read_info_values(folder.location)["prepare_digest"]
    for manifest in read_manifests(folder):
        if manifest.latent_digest == latent_digest:
            yield manifest


def manifests_digest(folder: Folder) -> str:
    """Hex SHA-256 of what the manifests say of files of latents and captions, in order.

    It changes with every byte of those files, because their own digests are in it.
    """
    digest = hashlib.sha256(f"index {INDEX_VERSION}".encode())
    for manifest in current_manifests(folder):
        files = [entry.to_dict() for entry in manifest.files if entry.kind != "status"]
        digest.update(json.dumps([manifest.shard, files], sort_keys=True).encode())
    return digest.hexdigest()


def _slot(hashed: int, count: int) -> int:
    return ((hashed >> 32) * count) >> 32


def _mapped(folder: Folder) -> pa.Table | None:
    """The table of the index file; None if there is none of this version."""
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
    for manifest in current_manifests(folder):
        for file, part in _shard_rows(folder, manifest, len(files)):
            files.append(file)
            parts.append(part)
    unsorted = pa.concat_tables(parts) if parts else _SCHEMA.empty_table().drop(["first"])
    order = [(name, "ascending") for name in ("hash", "key", "window", "file")]
    table = unsorted.sort_by(order).combine_chunks()
    hashes = table["hash"].to_numpy()
    count = len(table)
    slots = ((hashes >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
    first = np.searchsorted(slots, np.arange(count, dtype=np.uint64))
    table = table.add_column(0, "first", pa.array(first, pa.int64()))
    values = {"digest": digest, "files": [vars(file) for file in files]}
    text = json.dumps(values, sort_keys=True)
    return table.cast(_SCHEMA).replace_schema_metadata({"flowreel": text})


def _shard_rows(
    folder: Folder, manifest: Manifest, number: int
) -> Iterator[tuple[IndexedFile, pa.Table]]:
    """The files of latents of a shard and, for each, its part of the index.

    Args:
        folder: the dataset.
        manifest: the shard's.
        number: of its first file among all.
    """
    captions = _keys(folder, manifest.captions.path)
    caption_places = dict(
        zip(captions.ids(), zip(captions.groups, captions.rows, strict=True), strict=True)
    )
    for place, entry in enumerate(manifest.latents):
        latents = _keys(folder, entry.path)
        without = [key for key, window in latents.ids() if (key, window) not in caption_places]
        if without:
            raise LatentDatasetError(
                f"shard {manifest.shard!r} has latents of {without[0]!r} but no caption "
                f"({len(without)} in all); its manifest is damaged: delete it and prepare the "
                "shard again"
            )
        texts = np.array([caption_places[i] for i in latents.ids()]).reshape(-1, 2)
        columns = {
            "hash": pa.array([key_hash(key) for key in latents.keys], pa.uint64()),
            "key": pa.array(latents.keys, pa.large_string()),
            "window": pa.array(latents.windows, pa.int32()),
            "file": pa.array(np.full(len(latents.keys), number + place, dtype=np.int32)),
            "group": pa.array(latents.groups, pa.int32()),
            "row": pa.array(latents.rows, pa.int32()),
            "caption_group": pa.array(texts[:, 0], pa.int32()),
            "caption_row": pa.array(texts[:, 1], pa.int32()),
        }
        file = IndexedFile(manifest.shard, entry.bucket, entry.path, manifest.captions.path)
        yield file, pa.table(columns)


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
