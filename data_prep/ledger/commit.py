"""A shard's files and its manifest, written once all its samples are staged.

    OUT/status/SHARD.parquet, OUT/latents/SHARD.BUCKET.parquet, OUT/captions/SHARD.parquet

Files are written in the order of keys and the manifest last of all: the same samples give the same
bytes, and a kill leaves the old shard, no shard or the new one. Knows nothing of Ray or of how a
sample is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace

import pyarrow as pa

from data_prep.latents.records import (
    CAPTION_SCHEMA,
    LATENT_SCHEMA,
    STATUS_SCHEMA,
    row_groups,
    write_groups,
)
from data_prep.ledger.job import ShardJob
from data_prep.ledger.manifest import (
    FileEntry,
    Kind,
    Manifest,
    read_manifests,
    remove_manifest,
    write_manifest,
)
from data_prep.ledger.staging import Place, StagedSample, Staging
from data_prep.row import Row
from data_prep.storage.folder import Folder
from data_prep.storage.uris import recorded
from data_prep.texts.records import TEXT_SCHEMA

_SCHEMAS: dict[Kind, pa.Schema] = {
    "status": STATUS_SCHEMA,
    "latents": LATENT_SCHEMA,
    "captions": CAPTION_SCHEMA,
    "texts": TEXT_SCHEMA,
}


class Committer:
    """Writes the files of finished shards.

    >>> import tempfile
    >>> from data_prep.ledger.manifest import read_manifest
    >>> from data_prep.ledger.staging import STAGED_SCHEMA
    >>> from data_prep.sources.samples import ShardSummary
    >>> from data_prep.storage.store import open_folder
    >>> folder = open_folder(tempfile.mkdtemp())
    >>> staging = Staging(folder)
    >>> job = ShardJob("00000", "/data/00000.tar", "size:9 mtime_ns:1", "aa", "bb")
    >>> row = {"key": "a", "shard": "00000", "number": 0, "status": "failed",
    ...        "reason": "empty_video", "detail": "it has 0 bytes"}
    >>> staging.put(job, pa.Table.from_pylist([row], STAGED_SCHEMA))
    >>> staging.end(job, ShardSummary(num_samples=1))
    >>> Committer(folder, staging).commit(job, old=None)
    >>> read_manifest(folder, "00000").reasons
    {'empty_video': 1}

    Args:
        folder: the output.
        staging: its staged samples.
        still_ours: raises if the right to write was lost (`data_prep.ledger.locks.lock_writing`).
    """

    def __init__(
        self, folder: Folder, staging: Staging, still_ours: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = folder
        self.staging = staging
        self._still_ours = still_ours

    def commit(self, job: ShardJob, old: Manifest | None) -> None:
        """Write the shard's files and manifest. All its samples are staged, and its end is known.

        Args:
            job: the job that is done.
            old: the manifest of the shard that stands, if one does.

        Raises:
            StorageError: the disk or the store failed.
            OutputBusy: the right to write was lost.
        """
        summary = self.staging.summary(job)
        assert summary is not None
        staged = self.staging.samples(job)
        samples = [staged[number] for number in range(summary.num_samples)]
        samples.sort(key=lambda sample: (sample.rows[0]["key"].encode(), sample.rows[0]["number"]))
        heads = [sample.rows[0] for sample in samples]
        kept_samples = [sample for sample in samples if sample.rows[0]["status"] == "kept"]
        self._still_ours()
        if old is not None:
            # Without a manifest nobody reads files that are about to be replaced.
            remove_manifest(self.folder, job.name)
        files = (
            self._write("status", f"{job.name}.parquet", row_groups(heads, STATUS_SCHEMA)),
            *self._write_latents(job, kept_samples),
            self.write_captions(job.name, (row for s in kept_samples for row in s.rows)),
        )
        manifest = Manifest(
            shard=job.name,
            source=recorded(job.source),
            fingerprint=job.fingerprint,
            job=job.digest,
            latent_digest=job.latent_digest,
            caption_digest=job.caption_digest,
            outcome_digest=job.outcome_digest,
            encode_digest=job.encode_digest,
            **asdict(summary),
            counts=_counted(row["status"] for row in heads),
            reasons=_counted(row["reason"] for row in heads if row["reason"]),
            notes=_counted(_notes(heads)),
            dropped=_counted(row["reason"] for row in heads if row["status"] == "dropped"),
            files=files,
        )
        self.write_manifest(manifest)
        new_paths = {entry.path for entry in files}
        for entry in old.files if old is not None else ():
            if entry.path not in new_paths:
                self.folder.remove(entry.path)
        self.staging.forget(job)

    def write_captions(self, shard: str, rows: Iterable[Row]) -> FileEntry:
        """A shard's file of captions; its entry counts the clips without a synthetic one."""
        failures: Counter[str] = Counter()

        def counted() -> Iterator[Row]:
            for row in rows:
                if row["caption_error"]:
                    failures[row["caption_error"].partition(":")[0]] += 1
                yield row

        groups = row_groups(counted(), CAPTION_SCHEMA)
        entry = self._write("captions", f"{shard}.parquet", groups)
        return replace(entry, failures=dict(sorted(failures.items())))

    def write_manifest(self, manifest: Manifest) -> None:
        """Make a shard's files the ones that count, if the right to write still holds."""
        self._still_ours()
        write_manifest(self.folder, manifest)

    def _write_latents(self, job: ShardJob, samples: Sequence[StagedSample]) -> list[FileEntry]:
        """One file a bucket; the moments are views of the staged files."""
        places_by_bucket: dict[str, list[Place]] = {}
        for rows, (base, first) in samples:
            for place, row in enumerate(rows, first):
                places_by_bucket.setdefault(row["bucket"], []).append(Place(base, place))
        entries = []
        for bucket, places in sorted(places_by_bucket.items()):
            groups = self.staging.groups(job, places)
            entry = self._write("latents", f"{job.name}.{bucket}.parquet", groups)
            entries.append(replace(entry, bucket=bucket))
        return entries

    def _write(self, kind: Kind, base: str, groups: Iterable[pa.Table]) -> FileEntry:
        """One output file, and its entry in the manifest."""
        name = f"{kind}/{base}"
        with self.folder.replacing(name) as partial:
            count, digest = write_groups(partial, groups, _SCHEMAS[kind])
        return FileEntry(kind, name, count, digest)


def _counted(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def _notes(heads: Sequence[Row]) -> Iterator[str]:
    """What is odd about each sample that is kept: the first word of its detail, up to a colon."""
    for row in heads:
        if row["status"] == "kept" and row["detail"]:
            yield row["detail"].partition(":")[0]


def remove_leftovers(folder: Folder) -> None:
    """Remove what killed runs left: partial files, and files that no manifest names.

    Call it only while both locks of the output are held. Staged samples stay: they are work done.
    """
    folder.remove_partials()
    bases_by_kind = {kind: folder.names(kind) for kind in _SCHEMAS}
    if not any(bases_by_kind.values()):
        return
    paths = {entry.path for manifest in read_manifests(folder) for entry in manifest.files}
    for kind, bases in bases_by_kind.items():
        for base in bases:
            if base.endswith(".parquet") and f"{kind}/{base}" not in paths:
                folder.remove(f"{kind}/{base}")
