"""The index of a latent dataset: where the record of a key lies, found without a search.

    ROOT/index.arrow    mapped, not read; `data_prep.latents.index_file` has its columns

Slot b of n holds the records whose hash lies in [b, b+1) / n, and column `first` says where it
starts. So a look-up reads two entries of `first` and the one or two hashes between them, however
many records there are. The file names the digest of the manifests: if they have changed, it is made
anew and replaced whole. Of a store's dataset the file is copied to this machine once. Knows nothing
of Ray or torch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.latents.ids import Ids, Rows
from data_prep.latents.index_file import (
    INDEX_NAME,
    INDEX_VERSION,
    IndexColumns,
    Integers,
    as_arrow,
    build_columns,
    key_hash,
    slot_of,
)
from data_prep.latents.records import (
    LatentDatasetError,
    LatentRecord,
    read_info_values,
    read_record,
)
from data_prep.ledger.manifest import Manifest, Manifests
from data_prep.storage.cache import local_copy
from data_prep.storage.folder import Folder
from data_prep.storage.location import Location, StorageError
from data_prep.storage.store import open_folder
from flowreel.locks import LockHeld

log = logging.getLogger("flowreel.prepare")

_NUMBERS = (
    "first", "hash", "window", "file", "group", "row", "caption_group", "caption_row", "by_id",
    "by_split", "file_shard",
)  # fmt: skip

Split = Literal["train", "held_out", "all"]


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
class Named:
    """Records by what their ids say; three lists of one length."""

    shards: Sequence[str]
    keys: Sequence[str]
    windows: Sequence[int]


class LatentIndex:
    """Look-ups in constant time. Get one with `LatentIndex.open(root)`.

    Columns are views of the mapped file: opening costs the digest of the manifests, not memory, and
    all processes of a machine share what they read of it.

        index = LatentIndex.open("/data/latents")
        index.find("clip0007", window=0).path    # 'latents/00000.17x64x64.parquet'
    """

    def __init__(self, folder: Folder, columns: IndexColumns) -> None:
        self.folder = folder
        self.digest = columns.digest
        self.segments = columns.segments
        self._columns: dict[str, Integers] = {name: columns.numbers(name) for name in _NUMBERS}
        self._keys = columns.texts("key")
        self._shards = columns.texts("shard")
        self._paths = columns.texts("file_path")
        self._captions = columns.texts("shard_captions")
        self._count = len(self._columns["hash"])

    @classmethod
    def open(cls, root: Location) -> LatentIndex:
        """Map `root/index.arrow`, or this machine's copy of it.

        The index is made first if there is none, or if the manifests have changed since.

        Raises:
            LatentDatasetError: no dataset there, or a damaged one.
            DamagedManifest: a manifest cannot be read.
            StorageError: the disk or store fails.
        """
        folder = open_folder(root)
        manifests = Manifests(folder)
        digest = _digest_of(manifests)
        columns = _standing(folder)
        if columns is None or columns.digest != digest:
            columns = build_columns(folder, _current(manifests), digest, columns)
            try:
                with folder.replacing(INDEX_NAME) as partial, pa.OSFile(str(partial), "wb") as sink:
                    columns.write(sink)
            except StorageError as error:
                # A dataset that may not be written to is read as well; it only opens more slowly.
                log.warning("the index stays in memory: %s", error)
            else:
                written = _standing(folder)
                if written is not None and written.digest == digest:
                    columns = written
        return cls(folder, columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentIndex.open, (self.folder.location,)

    def __len__(self) -> int:
        return self._count

    def find(self, key: str, window: int = 0, shard: str | None = None) -> Place | None:
        """Where the record of (key, window) lies; None if there is none.

        Raises:
            LatentDatasetError: several shards have that key and none was named.
        """
        row = self.row(key, window, shard)
        return None if row is None else self.place(row)

    def row(self, key: str, window: int = 0, shard: str | None = None) -> int | None:
        """The record's number in this index, as `find`."""
        rows = list(self._rows(key, window))
        if shard is not None:
            rows = [row for row in rows if self._shard(row) == shard]
        if len(rows) > 1:
            names = ", ".join(sorted(self._shard(row) for row in rows)[:5])
            raise LatentDatasetError(f"key {key!r} is in several shards ({names}); name one")
        return rows[0] if rows else None

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

    def _rows(self, key: str, window: int) -> Iterator[int]:
        """Every shard's record of (key, window)."""
        count, hashed = len(self), key_hash(key)
        if not count:
            return
        first, hashes = self._columns["first"], self._columns["hash"]
        slot = slot_of(hashed, count)
        low = int(first[slot])
        high = int(first[slot + 1]) if slot + 1 < count else count
        inside = hashes[low:high]
        start = low + int(np.searchsorted(inside, np.uint64(hashed), side="left"))
        stop = low + int(np.searchsorted(inside, np.uint64(hashed), side="right"))
        for row in range(start, stop):
            if self._columns["window"][row] == window and self._keys[row].as_py() == key:
                yield row

    def rows_of(self, named: Named) -> Rows:
        """Numbers of those of these records that are here, sorted; all are looked up at once."""
        hashes = np.array([key_hash(key) for key in named.keys], dtype=np.uint64)
        low = np.searchsorted(self._columns["hash"], hashes, side="left")
        counts = np.searchsorted(self._columns["hash"], hashes, side="right") - low
        # Every record of an equal hash is a candidate: other windows and shards have the key too.
        asked = np.repeat(np.arange(len(hashes)), counts)
        rows = np.repeat(low - np.append(0, np.cumsum(counts)[:-1])[: len(low)], counts)
        rows = rows + np.arange(len(rows))
        windows = np.asarray(named.windows, dtype=np.int32)
        same = self._columns["window"][rows] == windows[asked]
        texts = (self._keys, named.keys), (self._shards, named.shards)
        owners = rows, self._columns["file_shard"][self._columns["file"][rows]]
        for (ours, theirs), places in zip(texts, owners, strict=True):
            wanted = pa.array(theirs, pa.large_string()).take(as_arrow(asked))
            same &= pc.equal(ours.take(as_arrow(places)), wanted).to_numpy(zero_copy_only=False)
        return np.unique(rows[same])

    def place(self, row: int) -> Place:
        """Where the record of this number lies."""

        def entry(name: str) -> int:
            return int(self._columns[name][row])

        file = entry("file")
        shard = int(self._columns["file_shard"][file])
        return Place(
            shard=self._shards[shard].as_py(),
            path=self._paths[file].as_py(),
            group=entry("group"),
            row=entry("row"),
            caption_path=self._captions[shard].as_py(),
            caption_group=entry("caption_group"),
            caption_row=entry("caption_row"),
        )

    def _shard(self, row: int) -> str:
        shard = self._columns["file_shard"][self._columns["file"][row]]
        name: str = self._shards[int(shard)].as_py()
        return name

    def names(self, rows: Rows) -> list[str]:
        """The ids `SHARD/KEY/WINDOW` of records, by their numbers."""
        shards = self._columns["file_shard"][self._columns["file"][rows]]
        named = self._shards.take(as_arrow(shards)).to_pylist()
        keys = self._keys.take(as_arrow(rows)).to_pylist()
        windows = self._columns["window"][rows].tolist()
        return [f"{shard}/{key}/{n}" for shard, key, n in zip(named, keys, windows, strict=True)]

    def ids(self, split: Split = "all") -> dict[str, Ids]:
        """Ids by bucket, sorted; empty buckets are left out.

        Args:
            split: "train", "held_out" (one key in HELD_OUT_SHARE) or "all".
        """
        column = self._columns["by_id" if split == "all" else "by_split"]
        by_bucket: dict[str, Ids] = {}
        start = 0
        for bucket, train, held_out in self.segments:
            spans = {"all": (0, train + held_out), "train": (0, train)}
            low, high = spans.get(split, (train, train + held_out))
            if low < high:
                by_bucket[bucket] = Ids(self, column[start + low : start + high])
            start += train + held_out
        return by_bucket


def current_manifests(folder: Folder) -> Iterator[Manifest]:
    """The manifests of the finished shards, in the order of their names.

    A shard made with other settings than the dataset's now (`prepare --redo`) is not finished.
    """
    return _current(Manifests(folder))


def manifests_digest(folder: Folder) -> str:
    """Hex SHA-256 of what the manifests say of files of latents and captions, in order.

    It changes with every byte of those files, because their own digests are in it.
    """
    return _digest_of(Manifests(folder))


def _current(manifests: Manifests) -> Iterator[Manifest]:
    latent_digest = read_info_values(manifests.folder.location)["prepare_digest"]
    for manifest in manifests.read():
        if manifest.latent_digest == latent_digest:
            yield manifest


def _digest_of(manifests: Manifests) -> str:
    latent_digest = read_info_values(manifests.folder.location)["prepare_digest"]
    digest = hashlib.sha256(f"index {INDEX_VERSION}".encode())
    for head in manifests.heads():
        if head.latent_digest == latent_digest:
            digest.update(head.records_digest.encode())
    return digest.hexdigest()


def _standing(folder: Folder) -> IndexColumns | None:
    """The columns of the index file, mapped; None if there is none of this version."""
    try:
        path = local_copy(folder, INDEX_NAME)
    except (StorageError, LockHeld) as error:
        log.warning("no copy of the index on this machine, so it is read into memory: %s", error)
        return IndexColumns.read(pa.BufferReader(folder.read(INDEX_NAME)))
    return None if path is None else IndexColumns.read(pa.memory_map(str(path)))
