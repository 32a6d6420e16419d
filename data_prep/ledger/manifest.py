"""What stands of a finished shard: its manifest, the only truth about what is done.

    OUT/manifests/SHARD.json   written last of a shard's files, removed first
    OUT/manifests.parquet      those that a run folded at its end, many in one file

A manifest of its own wins over one in the file. `{"removed": true}` in its place says that the one
in the file does not count any more. Knows nothing of rows, of how a shard is made, or of how its
files are read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.ledger.errors import DamagedManifest
from data_prep.ledger.manifest_file import (
    Head,
    ManifestFile,
    ManifestRow,
    opened_manifest_file,
    write_manifest_file,
)
from data_prep.storage.folder import Folder, map_at_once

MANIFESTS = "manifests"
"""The folder of the manifests, below the output."""
FOLDED_FROM = 64
"""An output of so many shards has its manifests folded into one file."""
_PART = 1024
"""So many manifests are held in memory at once."""
_REMOVED = b'{"removed": true}'

Kind = Literal["status", "latents", "captions", "texts"]


@dataclass(frozen=True)
class FileEntry:
    """One output file of a shard."""

    kind: Kind
    path: str
    """Relative to the output."""
    rows: int
    sha256: str
    bucket: str = ""
    """FRAMESxHEIGHTxWIDTH of a file of latents; empty for other kinds."""
    failures: dict[str, int] | None = None
    """Clips without a synthetic caption, by code, in a file of captions; None for other kinds."""
    made_by: str = ""
    """Digest of settings and captions, of a file of texts (`data_prep.texts.write`); else empty."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values; what other kinds have is left out."""
        values: dict[str, Any] = {
            "kind": self.kind,
            "path": self.path,
            "rows": self.rows,
            "sha256": self.sha256,
        }
        if self.bucket:
            values["bucket"] = self.bucket
        if self.failures is not None:
            values["failed"] = self.failures
        if self.made_by:
            values["made_by"] = self.made_by
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FileEntry:
        """From plain values. Raises KeyError where one is missing."""
        return cls(
            kind=values["kind"],
            path=values["path"],
            rows=values["rows"],
            sha256=values["sha256"],
            bucket=values.get("bucket", ""),
            failures=values.get("failed"),
            made_by=values.get("made_by", ""),
        )


@dataclass(frozen=True)
class Manifest:
    """What is known of a finished shard.

    >>> status = FileEntry("status", "status/00000.parquet", rows=2, sha256="9f86d0")
    >>> captions = FileEntry("captions", "captions/00000.parquet", rows=0, sha256="4355a4")
    >>> manifest = Manifest(
    ...     shard="00000", source="/data/00000.tar", fingerprint="size:9 mtime_ns:1", job="3f0c",
    ...     latent_digest="aa", caption_digest="bb", outcome_digest="cc", encode_digest="dd",
    ...     num_samples=2, truncated=False, ignored_members=0, error="", sha256="6ba7b8",
    ...     counts={"failed": 2}, reasons={"empty_video": 2}, notes={}, files=(status, captions),
    ... )
    >>> Manifest.from_json(manifest.to_json()) == manifest
    True
    >>> manifest.captions.path, manifest.keeps_all
    ('captions/00000.parquet', False)
    """

    shard: str
    """The shard's name in this output."""
    source: str
    """Path or URI of the shard."""
    fingerprint: str
    """See `data_prep.sources.find.fingerprint`."""
    job: str
    """Digest of the job that made it (`ShardJob.digest`)."""
    latent_digest: str
    """Of the settings that decide status and latents."""
    caption_digest: str
    """Of the settings that decide the synthetic captions."""
    num_samples: int
    truncated: bool
    """The shard ends too early, or is damaged on the way."""
    ignored_members: int
    error: str
    """Why nothing, or nothing more, could be read of the shard; empty where all was read."""
    sha256: str
    """Hex SHA-256 of the shard's content."""
    counts: dict[str, int]
    """Samples by status."""
    reasons: dict[str, int]
    """Samples that are not kept, by reason."""
    files: tuple[FileEntry, ...]
    notes: dict[str, int] | None = None
    """Samples that are kept although something is odd, by what; None in old manifests."""
    outcome_digest: str | None = None
    """Of the settings that decide them, metadata filters aside; None in old manifests."""
    encode_digest: str | None = None
    """Of the settings that decide latents, given the frames; None in old manifests."""
    dropped: dict[str, int] | None = None
    """Those of `reasons` that a filter decided, the others failed; None in old manifests."""
    unjudged: dict[str, int] | None = None
    """Samples that passed a metadata filter because they lack its field, by the field; `samples`
    are all that came to the filters. None in old manifests."""

    @property
    def head(self) -> Head:
        """What opening the dataset needs of it."""
        files = [e.to_dict() for e in self.files if e.kind in ("latents", "captions")]
        text = json.dumps([self.shard, files], sort_keys=True)
        return Head(self.shard, self.latent_digest, hashlib.sha256(text.encode()).hexdigest())

    @property
    def status(self) -> FileEntry:
        """The file of status rows."""
        return self._only("status")

    @property
    def captions(self) -> FileEntry:
        """The file of captions."""
        return self._only("captions")

    @property
    def texts(self) -> FileEntry | None:
        """The file of encoded prompts, once there is one."""
        return next((entry for entry in self.files if entry.kind == "texts"), None)

    @property
    def latents(self) -> tuple[FileEntry, ...]:
        """The files of latents, one a bucket."""
        return tuple(entry for entry in self.files if entry.kind == "latents")

    @property
    def keeps_all(self) -> bool:
        """Whether no sample was dropped or failed."""
        return not set(self.counts) - {"kept"}

    @property
    def lost(self) -> dict[tuple[str, str], int] | None:
        """Samples not kept by (status, reason); None where an old manifest does not tell."""
        statuses = sorted(set(self.counts) - {"kept"})
        if len(statuses) < 2:
            return {
                (status, reason): n for status in statuses for reason, n in self.reasons.items()
            }
        if self.dropped is None:
            return None
        failed = Counter(self.reasons) - Counter(self.dropped)
        by_status = {"dropped": self.dropped, "failed": failed}
        return {(s, reason): n for s, counts in by_status.items() for reason, n in counts.items()}

    def _only(self, kind: Kind) -> FileEntry:
        return next(entry for entry in self.files if entry.kind == kind)

    def to_json(self) -> bytes:
        """As it is stored: the same manifest gives the same bytes."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        values["files"] = [entry.to_dict() for entry in self.files]
        return json.dumps(values, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """From its stored form. Raises DamagedManifest where that is not one."""
        try:
            values = json.loads(data)
            files = tuple(FileEntry.from_dict(entry) for entry in values["files"])
            names = cls.__dataclass_fields__
            fields = {name: value for name, value in values.items() if name in names}
            manifest = cls(**{**fields, "files": files})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedManifest(f"{type(error).__name__}: {error}") from error
        if {"status", "captions"} - {entry.kind for entry in files}:
            raise DamagedManifest("it names no file of status rows, or none of captions")
        return manifest


class Manifests:
    """The manifests of an output that stood when this was made.

    Two requests open it, however many shards there are; those that are folded are read no further.

    >>> import tempfile
    >>> from data_prep.storage.store import open_folder
    >>> manifests = Manifests(open_folder(tempfile.mkdtemp()))
    >>> manifests.get("00000"), list(manifests.read())
    (None, [])

    Raises:
        DamagedManifest: the file of folded manifests cannot be read.
        StorageError: the disk or store fails.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        # Listed before the file is read, and written into it before they are removed: what is
        # folded meanwhile is in one of the two.
        self._single = set(_single_shards(folder))
        self._file = ManifestFile.read(folder)

    def shards(self) -> list[str]:
        """Names of the shards that may have a manifest, sorted."""
        return sorted(self._single.union(self._file.shards if self._file else ()))

    def get(self, shard: str) -> Manifest | None:
        """A shard's manifest; None where the shard is not finished. Raises as `read_manifest`."""
        data = self._data(shard)
        return None if data is None else _parsed(self.folder, shard, data)

    def read(self, shards: Sequence[str] | None = None) -> Iterator[Manifest]:
        """Those of these shards, or of all, in the order given or sorted.

        Raises as `read_manifest`.
        """
        for shard, data in self._stored(self.shards() if shards is None else shards):
            yield _parsed(self.folder, shard, data)

    def heads(self) -> Iterator[Head]:
        """Of every manifest, in order of the shards' names. Raises as `read_manifest`."""
        folded = {head.shard: head for head in self._file.heads()} if self._file else {}
        single = {manifest.shard: manifest.head for manifest in self.read(sorted(self._single))}
        for shard in self.shards():
            head = single.get(shard) if shard in self._single else folded[shard]
            if head is not None:
                yield head

    def rows(self) -> Iterator[ManifestRow]:
        """Every manifest as `manifests.parquet` holds it. Raises as `read_manifest`."""
        folded = self._file.rows() if self._file else iter(())
        single = self._stored(sorted(self._single))
        row, own = next(folded, None), next(single, None)
        for shard in self.shards():
            if own is not None and own[0] == shard:
                yield ManifestRow(_parsed(self.folder, *own).head, own[1])
                own = next(single, None)
            if row is not None and row.head.shard == shard:
                if shard not in self._single:
                    yield row
                row = next(folded, None)

    def _stored(self, shards: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Name and stored form of those that stand, read many at once."""
        for start in range(0, len(shards), _PART):
            part = shards[start : start + _PART]
            single = [shard for shard in part if shard in self._single]
            found = dict(zip(single, self._read_all(single), strict=True))
            for shard in part:
                data = found[shard] if shard in found else self._data(shard)
                if data is not None:
                    yield shard, data

    def _read_all(self, shards: Sequence[str]) -> Iterator[bytes | None]:
        return map_at_once(self._data, shards, self.folder.threads)

    def _data(self, shard: str) -> bytes | None:
        if shard in self._single:
            return _stored_manifest(self.folder, shard)
        return self._file.get(shard) if self._file else None


def read_manifest(folder: Folder, shard: str) -> Manifest | None:
    """The manifest of a shard; None where the shard is not finished.

    For many shards use `Manifests`, which asks once for all.

    Raises:
        DamagedManifest: it cannot be read; the message names it and says what to do.
        StorageError: the disk or store fails.
    """
    data = _stored_manifest(folder, shard)
    return None if data is None else _parsed(folder, shard, data)


def read_manifests(folder: Folder, shards: Sequence[str] | None = None) -> Iterator[Manifest]:
    """The manifests that stand, of these shards or of all, in the order of names given or sorted.

    Raises as `read_manifest`.
    """
    yield from Manifests(folder).read(shards)


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Make a shard's files the ones that count. Call it last, while the output may be written."""
    folder.write(_name(manifest.shard), manifest.to_json())


def remove_manifest(folder: Folder, shard: str) -> None:
    """Make a shard unfinished, so that nobody reads files that are about to be replaced."""
    file = opened_manifest_file(folder)
    if file is not None and shard in file:
        folder.write(_name(shard), _REMOVED)
    else:
        folder.remove(_name(shard))


def fold_manifests(folder: Folder, single_from: int = 1) -> None:
    """Put all manifests into one file, if the output has `FOLDED_FROM` shards or more.

    Killed at any moment it leaves every manifest in one of the two places or in both. Call it while
    the output's lock is held and nobody commits shards. Raises as `read_manifest`.

    Args:
        folder: the output.
        single_from: do nothing if fewer shards have a manifest of their own.
    """
    single = _single_shards(folder)
    if len(single) < single_from:
        return
    manifests = Manifests(folder)
    if len(manifests.shards()) < FOLDED_FROM:
        return
    write_manifest_file(folder, manifests.rows())
    # They are in the file now; what says that a shard is removed has done its work.
    if _single_shards(folder) == single:
        folder.remove_folder(MANIFESTS)


def _single_shards(folder: Folder) -> list[str]:
    """Shards with a manifest of their own, sorted."""
    bases = folder.names(MANIFESTS)
    return [base.removesuffix(".json") for base in bases if base.endswith(".json")]


def _stored_manifest(folder: Folder, shard: str) -> bytes | None:
    """A shard's manifest as it is stored, wherever it is; None if there is none."""
    try:
        data = folder.read(_name(shard))
    except FileNotFoundError:
        # Looked for in the file after that, because it may have been folded in between.
        file = opened_manifest_file(folder)
        return None if file is None else file.get(shard)
    return None if data == _REMOVED else data


def _parsed(folder: Folder, shard: str, data: bytes) -> Manifest:
    try:
        return Manifest.from_json(data)
    except DamagedManifest as error:
        raise DamagedManifest(
            f"{folder.where(_name(shard))} is damaged ({error}); delete it and prepare the shard "
            "again"
        ) from error


def _name(shard: str) -> str:
    return f"{MANIFESTS}/{shard}.json"
