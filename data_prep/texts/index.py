"""Where the vectors of a prompt lie: a mapped file of look-ups, shared by a machine's processes.

    ROOT/texts/index.arrow    `hash` (the first 64 bits of the prompt's id), `file`, `group`, `row`,
                              sorted by the hash; the files' paths are in the metadata

The file names the digest of the shards' files that it was made from, and is made anew where they
changed. Two prompts of one hash are told apart by their rows, which hold the prompts. Knows nothing
of how vectors are made.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.latents.index_file import as_arrow, as_numpy
from data_prep.ledger.manifest import FileEntry
from data_prep.storage.cache import local_copy
from data_prep.storage.folder import Folder, map_at_once
from data_prep.storage.location import StorageError
from data_prep.texts.records import TEXTS
from flowreel.locks import LockHeld

log = logging.getLogger("flowreel.prepare")

INDEX_NAME = f"{TEXTS}/index.arrow"
INDEX_VERSION = 1
_DTYPES = {"hash": np.uint64, "file": np.int32, "group": np.int32, "row": np.int32}
_SCHEMA = pa.schema([pa.field(n, pa.from_numpy_dtype(t)) for n, t in _DTYPES.items()])


class Place(NamedTuple):
    """Where a row lies: its file, the row group in it, and the row in that."""

    path: str
    group: int
    row: int


def hash_of(prompt_id: bytes) -> int:
    """The first 64 bits of a prompt's id.

    >>> hex(hash_of(bytes(range(32))))
    '0x1020304050607'
    """
    return int.from_bytes(prompt_id[:8], "big")


@dataclass(frozen=True)
class TextIndex:
    """Look-ups by the ids of prompts; columns are views of the mapped file.

    Attributes:
        batch: the columns.
        paths: the shards' files, by number.
    """

    batch: pa.RecordBatch
    paths: Sequence[str]

    @classmethod
    def open(cls, folder: Folder, entries: Sequence[FileEntry]) -> TextIndex:
        """The index of a dataset's files of texts; it is made first where none of them stands.

        Raises:
            StorageError: the disk or store fails.
        """
        digest = _digest_of(entries)
        batch = _standing(folder, digest)
        if batch is None:
            batch = _built(folder, entries, digest)
            try:
                with folder.writing(INDEX_NAME) as sink, pa.ipc.new_file(sink, batch.schema) as out:
                    out.write_batch(batch)
            except StorageError as error:
                # A dataset that may not be written to is read as well; it only opens more slowly.
                log.warning("the index of texts stays in memory: %s", error)
            else:
                batch = _standing(folder, digest) or batch
        return cls(batch, json.loads(batch.schema.metadata[b"flowreel"])["paths"])

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def places(self, prompt_id: bytes) -> Iterator[Place]:
        """Every row whose prompt has this hash: of each shard that has the prompt."""
        hashes, wanted = self._column("hash"), np.uint64(hash_of(prompt_id))
        start = int(np.searchsorted(hashes, wanted, side="left"))
        for at in range(start, len(hashes)):
            if hashes[at] != wanted:
                return
            file, group, row = (int(self._column(n)[at]) for n in ("file", "group", "row"))
            yield Place(self.paths[file], group, row)

    def _column(self, name: str) -> npt.NDArray[np.integer]:
        return as_numpy(self.batch.column(name))


def _digest_of(entries: Sequence[FileEntry]) -> str:
    text = json.dumps([INDEX_VERSION, [(entry.path, entry.sha256) for entry in entries]])
    return hashlib.sha256(text.encode()).hexdigest()


def _standing(folder: Folder, digest: str) -> pa.RecordBatch | None:
    """The columns of the index file, mapped; None where there is none of these files."""
    try:
        path = local_copy(folder, INDEX_NAME)
    except (StorageError, LockHeld) as error:
        log.warning("no copy of the index of texts on this machine: %s", error)
        return None
    if path is None:
        return None
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid:
        return None
    about = (file.schema.metadata or {}).get(b"flowreel")
    if about is None or not file.schema.equals(_SCHEMA) or json.loads(about)["digest"] != digest:
        return None
    return file.get_batch(0)


def _built(folder: Folder, entries: Sequence[FileEntry], digest: str) -> pa.RecordBatch:
    """The index, from the ids of every file."""
    found = list(map_at_once(lambda e: _rows_of(folder, e.path), entries, folder.threads))
    parts = {
        "hash": [hashes for hashes, _, _ in found],
        "file": [np.full(len(hashes), n) for n, (hashes, _, _) in enumerate(found)],
        "group": [groups for _, groups, _ in found],
        "row": [rows for _, _, rows in found],
    }
    columns = {
        name: np.concatenate([*arrays, np.empty(0, _DTYPES[name])]).astype(_DTYPES[name])
        for name, arrays in parts.items()
    }
    order = np.argsort(columns["hash"], kind="stable")
    about = json.dumps({"digest": digest, "paths": [entry.path for entry in entries]})
    return pa.record_batch(
        [as_arrow(columns[name][order]) for name in _DTYPES],
        schema=_SCHEMA.with_metadata({"flowreel": about}),
    )


def _rows_of(
    folder: Folder, path: str
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Hash, row group and row in it of every row of a file."""
    with folder.failing("read", path), folder.open(path) as source, pq.ParquetFile(source) as file:
        meta = file.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        ids = file.read(columns=["id"])["id"].to_pylist()
    hashes = np.array([hash_of(prompt_id) for prompt_id in ids], dtype=np.uint64)
    groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.concatenate([np.arange(size, dtype=np.int32) for size in [0, *sizes]])
    return hashes, groups, rows
