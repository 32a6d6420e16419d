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

from data_prep.latents.records import CAPTION_SCHEMA, LATENT_SCHEMA, STATUS_SCHEMA, write_rows
from data_prep.ledger.job import ShardJob
from data_prep.ledger.manifest import (
    FileEntry,
    Kind,
    Manifest,
    read_manifest,
    read_manifests,
    remove_manifest,
    write_manifest,
)
from data_prep.ledger.staging import Staging
from data_prep.row import Row
from data_prep.sources.samples import ShardSummary
from data_prep.storage.folder import Folder, map_at_once
from data_prep.storage.uris import recorded
from flowreel.values import sha256_of

_KINDS: tuple[Kind, ...] = ("status", "latents", "captions")


class Committer:
    """Writes the files of finished shards.

    >>> import tempfile
    >>> from data_prep.storage.store import open_folder
    >>> folder = open_folder(tempfile.mkdtemp())
    >>> staging = Staging(folder)
    >>> job = ShardJob("00000", "/data/00000.tar", "size:9 mtime_ns:1", "aa", "bb")
    >>> row = {"key": "a", "shard": "00000", "number": 0, "status": "failed",
    ...        "reason": "empty_video", "detail": "it has 0 bytes"}
    >>> staging.put(job, [row])
    >>> committer = Committer(folder, staging)
    >>> committer.commit_if_complete(job)
    False
    >>> staging.end(job, ShardSummary(num_samples=1))
    >>> committer.commit_if_complete(job), read_manifest(folder, "00000").reasons
    (True, {'empty_video': 1})

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

    def commit_if_complete(self, job: ShardJob) -> bool:
        """Write the shard's files and manifest if all its samples are staged; whether they are."""
        summary = self.staging.summary(job)
        if summary is None or len(self.staging.light_rows(job)) < summary.num_samples:
            return False
        self._commit(job, summary)
        return True

    def _commit(self, job: ShardJob, summary: ShardSummary) -> None:
        light = self.staging.light_rows(job)
        samples = [light[number] for number in range(summary.num_samples)]
        samples.sort(key=lambda rows: (rows[0]["key"].encode(), rows[0]["number"]))
        heads = [rows[0] for rows in samples]
        kept_rows = [row for rows in samples for row in rows if row["status"] == "kept"]
        self._still_ours()
        old = read_manifest(self.folder, job.name)
        # Without a manifest nobody reads files that are about to be replaced.
        remove_manifest(self.folder, job.name)
        files = (
            self._write("status", f"{job.name}.parquet", heads, STATUS_SCHEMA),
            *self._write_latents(job, kept_rows),
            self.write_captions(job.name, kept_rows),
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

        entry = self._write("captions", f"{shard}.parquet", counted(), CAPTION_SCHEMA)
        return replace(entry, failures=dict(sorted(failures.items())))

    def write_manifest(self, manifest: Manifest) -> None:
        """Make a shard's files the ones that count, if the right to write still holds."""
        self._still_ours()
        write_manifest(self.folder, manifest)

    def _write_latents(self, job: ShardJob, rows: Sequence[Row]) -> list[FileEntry]:
        """One file a bucket; the moments are read back from staging, a few samples at a time."""
        numbers_by_bucket: dict[str, list[int]] = {}
        for row in rows:
            numbers = numbers_by_bucket.setdefault(row["bucket"], [])
            # The windows of a sample follow one another, and are staged together.
            if row["number"] not in numbers[-1:]:
                numbers.append(row["number"])
        entries = []
        for bucket, numbers in sorted(numbers_by_bucket.items()):
            samples = map_at_once(lambda n: self.staging.rows(job, n), numbers, self.folder.threads)
            moments = (row for sample in samples for row in sample)
            entry = self._write("latents", f"{job.name}.{bucket}.parquet", moments, LATENT_SCHEMA)
            entries.append(replace(entry, bucket=bucket))
        return entries

    def _write(self, kind: Kind, base: str, rows: Iterable[Row], schema: pa.Schema) -> FileEntry:
        """One output file, and its entry in the manifest."""
        name = f"{kind}/{base}"
        with self.folder.replacing(name) as partial:
            count = write_rows(partial, rows, schema)
            digest = sha256_of(partial)
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
    bases_by_kind = {kind: folder.names(kind) for kind in _KINDS}
    if not any(bases_by_kind.values()):
        return
    paths = {entry.path for manifest in read_manifests(folder) for entry in manifest.files}
    for kind, bases in bases_by_kind.items():
        for base in bases:
            if base.endswith(".parquet") and f"{kind}/{base}" not in paths:
                folder.remove(f"{kind}/{base}")
