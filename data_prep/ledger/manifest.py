"""What stands of a finished shard: its manifest, the only truth about what is done.

    OUT/manifests/SHARD.json   written last of a shard's files, removed first

Knows nothing of rows, of how a shard is made, or of how its files are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.ledger.errors import DamagedManifest
from data_prep.storage.folder import Folder, map_at_once

MANIFESTS = "manifests"
"""The folder of the manifests, below the output."""

Kind = Literal["status", "latents", "captions"]


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
    unjudged: dict[str, int] | None = None
    """Samples that passed a metadata filter because they lack its field, by the field; `samples`
    are all that came to the filters. None in old manifests."""

    @property
    def status(self) -> FileEntry:
        """The file of status rows."""
        return self._only("status")

    @property
    def captions(self) -> FileEntry:
        """The file of captions."""
        return self._only("captions")

    @property
    def latents(self) -> tuple[FileEntry, ...]:
        """The files of latents, one a bucket."""
        return tuple(entry for entry in self.files if entry.kind == "latents")

    @property
    def keeps_all(self) -> bool:
        """Whether no sample was dropped or failed."""
        return not set(self.counts) - {"kept"}

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


def read_manifest(folder: Folder, shard: str) -> Manifest | None:
    """The manifest of a shard; None where the shard is not finished.

    Raises:
        DamagedManifest: it cannot be read; the message names it and says what to do.
        StorageError: the disk or store fails.
    """
    name = _name(shard)
    try:
        return Manifest.from_json(folder.read(name))
    except FileNotFoundError:
        return None
    except DamagedManifest as error:
        raise DamagedManifest(
            f"{folder.where(name)} is damaged ({error}); delete it and prepare the shard again"
        ) from error


def read_manifests(folder: Folder, shards: Sequence[str] | None = None) -> Iterator[Manifest]:
    """The manifests that stand, of these shards or of all, in the order of names given or sorted.

    Raises as `read_manifest`.
    """
    if shards is None:
        shards = [base.removesuffix(".json") for base in folder.names(MANIFESTS)]
    for manifest in map_at_once(lambda shard: read_manifest(folder, shard), shards, folder.threads):
        if manifest is not None:
            yield manifest


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Make a shard's files the ones that count. Call it last, while the output may be written."""
    folder.write(_name(manifest.shard), manifest.to_json())


def remove_manifest(folder: Folder, shard: str) -> None:
    """Make a shard unfinished, so that nobody reads files that are about to be replaced."""
    folder.remove(_name(shard))


def _name(shard: str) -> str:
    return f"{MANIFESTS}/{shard}.json"
