"""Many manifests in one file, so that a large output is opened by one read, not one a shard.

    OUT/manifests.parquet    a row per finished shard, sorted by name: its manifest as it was
                             written, and before it the little that opening the dataset needs

The same manifests give the same bytes. Knows nothing of what a manifest says beyond that.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.ledger.errors import DamagedManifest
from data_prep.storage.folder import Folder, LocalFolder

MANIFEST_FILE = "manifests.parquet"
_GROUP_ROWS = 1024
_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("latent_digest", pa.string(), nullable=False),
        pa.field("records_digest", pa.string(), nullable=False),
        pa.field("manifest", pa.large_binary(), nullable=False),
    ]
)
_OPEN_FILES = 4
_opened: OrderedDict[str, tuple[str, ManifestFile]] = OrderedDict()
"""Files that shards were looked up in one by one, by location, and the version of each."""
_opening = threading.Lock()


class Head(NamedTuple):
    """What opening a dataset needs of a manifest."""

    shard: str
    latent_digest: str
    """Of the settings that decided status and latents."""
    records_digest: str
    """Of what the manifest says of files of latents and captions."""


class ManifestRow(NamedTuple):
    """A manifest as it lies in the file."""

    head: Head
    data: bytes
    """JSON, as `manifests/SHARD.json` held it."""


class ManifestFile:
    """The file, open for reading; a manifest is taken out of it when it is asked for.

    >>> import tempfile
    >>> from data_prep.storage.folder import LocalFolder
    >>> folder = LocalFolder(tempfile.mkdtemp())
    >>> write_manifest_file(folder, [ManifestRow(Head("0", "aa", "bb"), b"{}")])
    >>> file = ManifestFile.read(folder)
    >>> file.shards, file.get("0"), file.get("1")
    (['0'], b'{}', None)
    """

    def __init__(self, where: str, source: pa.NativeFile) -> None:
        self._where = where
        with self._reading():
            self._parquet = pq.ParquetFile(source)
            if not self._parquet.schema_arrow.equals(_SCHEMA):
                raise pa.ArrowInvalid("its columns are others")
            self.shards: list[str] = self._column("shard")
        self._group: tuple[int, list[bytes]] = (-1, [])
        # A Parquet file is read by one thread at a time.
        self._lock = threading.Lock()

    @classmethod
    def read(cls, folder: Folder) -> ManifestFile | None:
        """The file of an output, whole; None where there is none.

        Raises:
            DamagedManifest: it is no such file.
            StorageError: the disk or store fails.
        """
        where = folder.where(MANIFEST_FILE)
        try:
            with _Reading(where):
                if isinstance(folder, LocalFolder):
                    # Mapped: whoever has it open keeps it when another takes its place.
                    source = pa.memory_map(f"{folder.location}/{MANIFEST_FILE}")
                else:
                    # One request, however large it is; a stream is read in parts.
                    with folder.failing("read", MANIFEST_FILE), folder.open(MANIFEST_FILE) as file:
                        source = pa.BufferReader(file.read_at(file.size(), 0))
        except FileNotFoundError:
            return None
        return cls(where, source)

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, shard: str) -> bool:
        return self._row(shard) is not None

    def heads(self) -> Iterator[Head]:
        """Of every manifest, in order of the shards' names."""
        with self._reading():
            columns = [self._column(name) for name in Head._fields]
        yield from map(Head, *columns)

    def rows(self) -> Iterator[ManifestRow]:
        """Every manifest, in order of the shards' names."""
        for row, head in enumerate(self.heads()):
            yield ManifestRow(head, self._data(row))

    def get(self, shard: str) -> bytes | None:
        """A shard's manifest, None if it is not in the file."""
        row = self._row(shard)
        return None if row is None else self._data(row)

    def _row(self, shard: str) -> int | None:
        row = bisect_left(self.shards, shard)
        return row if row < len(self.shards) and self.shards[row] == shard else None

    def _data(self, row: int) -> bytes:
        number, place = divmod(row, _GROUP_ROWS)
        with self._lock:
            if self._group[0] != number:
                with self._reading():
                    table = self._parquet.read_row_group(number, columns=["manifest"])
                self._group = number, table["manifest"].to_pylist()
            return self._group[1][place]

    def _column(self, name: str) -> list[str]:
        values: list[str] = self._parquet.read(columns=[name])[name].to_pylist()
        return values

    def _reading(self) -> _Reading:
        return _Reading(self._where)


class _Reading:
    """Says of a file that cannot be read which it is, and what to do."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError) and not isinstance(
            error, FileNotFoundError
        ):
            why = " ".join(str(error).split())[:200]
            raise DamagedManifest(
                f"{self.where} is damaged ({why}); put a copy of it back, or prepare the shards "
                "again into another output: all shards that it names count as finished"
            ) from error


def write_manifest_file(folder: Folder, rows: Iterable[ManifestRow]) -> None:
    """Write the file, whole. Call it while the output's lock is held.

    Args:
        folder: the output.
        rows: in order of the shards' names.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        _SCHEMA,
        compression="zstd",
        use_dictionary=["latent_digest"],
        write_statistics=False,
    ) as writer:
        part: list[tuple[str, str, str, bytes]] = []
        for row in rows:
            part.append((*row.head, row.data))
            if len(part) == _GROUP_ROWS:
                writer.write_table(_table(part))
                part = []
        if part:
            writer.write_table(_table(part))
    folder.write(MANIFEST_FILE, sink.getvalue())


def _table(rows: list[tuple[str, str, str, bytes]]) -> pa.Table:
    columns = zip(zip(*rows, strict=True), _SCHEMA, strict=True)
    return pa.table([pa.array(column, field.type) for column, field in columns], schema=_SCHEMA)


def opened_manifest_file(folder: Folder) -> ManifestFile | None:
    """The file, kept open between calls until another takes its place; None where there is none."""
    version = folder.version(MANIFEST_FILE)
    if not version:
        return None
    with _opening:
        known = _opened.get(folder.location)
        if known is None or known[0] != version:
            file = ManifestFile.read(folder)
            if file is None:
                return None
            known = _opened[folder.location] = version, file
            while len(_opened) > _OPEN_FILES:
                _opened.popitem(last=False)
        _opened.move_to_end(folder.location)
    return known[1]
