"""What is done: one manifest per input shard, and how a shard gets there whole.

    OUT/staging/SHARD/DIGEST/NUMBER.arrow   finished samples of shards that are not
    OUT/manifests/SHARD.json                written last; the only truth about what is done

The output is a local folder or one in an object store (`data_prep.storage.folder`): a file is there whole
or not at all. Samples of a shard may arrive in any order and more than once; when all numbers are
there the shard's files are written in key order and its manifest last. Kill it at any moment: staged
samples are found again, and the bytes come out the same. Knows nothing of Ray or of how a sample is
made.

    LedgerError(ValueError)
    ├── OutputBusy          another run holds the output's lock
    └── SettingsChanged     the output was prepared with other settings
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.latents.records import (
    CAPTION_SCHEMA,
    LATENT_SCHEMA,
    STATUS_SCHEMA,
    read_info_values,
    write_rows,
)
from data_prep.ledger.job import (
    Digests,
    ShardJob,
    caption_job,
)
from data_prep.sources.find import content_sha256, fingerprint
from data_prep.storage.folder import (
    Folder,
    LockHeld,
    map_at_once,
    write_atomically,
)
from data_prep.storage.location import (
    Location,
    is_uri,
    shown,
)
from data_prep.storage.store import open_folder
from flowreel.errors import FlowreelError

__all__ = [
    "STAGED_SCHEMA",
    "Ledger",
    "LedgerError",
    "OutputBusy",
    "SettingsChanged",
    "sha256_of",
    "write_atomically",
]

_LATENT_FIELDS = [f for f in LATENT_SCHEMA if f.name not in ("key", "number")]
_CAPTION_FIELDS = [f for f in CAPTION_SCHEMA if f.name not in ("key", "window")]
STAGED_SCHEMA = pa.schema(
    [*STATUS_SCHEMA, *(f.with_nullable(True) for f in (*_LATENT_FIELDS, *_CAPTION_FIELDS))]
)
"""A finished sample: its status, and, where kept, its latents and captions."""
_LIGHT = [f.name for f in STAGED_SCHEMA if f.name not in ("mean", "logvar", "pts_s", "shape")]
"""What is held in memory of the staged samples of the shards in flight."""
_DYING_S = 90.0
"""How long the writer of a killed run may take to go, in seconds."""


class LedgerError(FlowreelError, ValueError):
    """The output folder cannot be used as it stands."""


class OutputBusy(LedgerError):
    """Another run is writing to the same output."""


class SettingsChanged(LedgerError):
    """The output holds what other settings made."""


@dataclass
class Ledger:
    """The output folder of `prepare`, by path or URI."""

    out: Location
    folder: Folder = field(init=False, repr=False)
    _staged: dict[str, dict[int, list[dict[str, Any]]]] = field(default_factory=dict, repr=False)
    _summaries: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)
    _check: Callable[[], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.folder = open_folder(self.out)

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a finished shard, or None."""
        try:
            return dict(json.loads(self.folder.read(f"manifests/{name}.json")))
        except FileNotFoundError:
            return None

    def manifests(self, names: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The manifests that stand, of these shards or of all."""
        if names is None:
            names = [base.removesuffix(".json") for base in self.folder.names("manifests")]
        for done in map_at_once(self.manifest, names, self.folder.threads):
            if done is not None:
                yield done

    def jobs(
        self,
        sources: Mapping[str, str],
        digests: Digests,
        *,
        verify: bool = False,
    ) -> list[ShardJob]:
        """What is left to do for shards, given by name and source. Raises as `job` does."""

        def job(name: str) -> ShardJob | None:
            return self.job(name, sources[name], digests, verify=verify)

        threads = max([self.folder.threads, *(16 for s in sources.values() if is_uri(s))])
        found = map_at_once(job, list(sources), threads)
        return [job for job in found if job is not None]

    def job(
        self,
        name: str,
        source: str,
        digests: Digests,
        *,
        verify: bool = False,
    ) -> ShardJob | None:
        """What is left to do for a shard; None where its manifest stands for the same input.

        The input is the same where its size and modification time are, or with `verify` where its
        content is, whatever its time says.

        Raises:
            ShardError: the shard is not there.
        """
        seen = fingerprint(source)
        done = self.manifest(name)
        same = done is not None and done["latent_digest"] == digests.latent
        if done is not None and same:
            if verify:
                same = done["sha256"] == content_sha256(source)
            else:
                same = done["fingerprint"] == seen
        if done is not None and same and done["caption_digest"] == digests.caption:
            return None
        job = ShardJob(name, source, seen, *digests, standing=done is not None)
        return caption_job(job, done) if done is not None and same else job

    def is_done(self, job: ShardJob) -> bool:
        """Whether the manifest of exactly this job stands."""
        done = self.manifest(job.name)
        return done is not None and done["job"] == job.digest

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the output for one run, against every other; it is let go when the process dies.

        What killed runs left is removed first.

        Raises:
            OutputBusy: another process holds it.
        """
        busy = f"another run is writing to {shown(self.out)}; wait for it, or choose another output"
        with _held(self.folder, ".lock", busy):
            with self.writing():
                self.clean()
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the right to write, apart from `lock`: the writer is a process of its own and may
        outlive a killed run for a moment, which is waited for.

        Raises:
            OutputBusy: another process keeps it.
        """
        busy = f"the writer of another run still holds {shown(self.out)}; run again when it is gone"
        with _held(self.folder, ".lock-writer", busy, wait_s=_DYING_S) as check:
            self._check = check
            try:
                yield
            finally:
                self._check = None

    def clean(self) -> None:
        """Remove what killed runs left: partial files, and files that no manifest names.

        Only for who holds both locks. Staged samples stay: they are work done.
        """
        self.folder.remove_partials()
        kinds = {kind: self.folder.names(kind) for kind in ("status", "latents", "captions")}
        if not any(kinds.values()):
            return
        named = {entry["path"] for done in self.manifests() for entry in done["files"]}
        for kind, bases in kinds.items():
            for base in bases:
                if base.endswith(".parquet") and f"{kind}/{base}" not in named:
                    self.folder.remove(f"{kind}/{base}")

    def staging(self, job: ShardJob) -> str:
        """Name of the folder of a job's staged samples."""
        return f"staging/{job.name}/{job.digest}"

    def staged_numbers(self, job: ShardJob) -> set[int]:
        """Numbers of the samples that an earlier run, or this one, has finished."""
        bases = (base.partition(".") for base in self.folder.names(self.staging(job)))
        return {int(stem) for stem, _, suffix in bases if suffix == "arrow" and stem.isdigit()}

    def stage(self, job: ShardJob, rows: Sequence[dict[str, Any]]) -> None:
        """Keep one finished sample: rows of STAGED_SCHEMA, one per window, all of one number."""
        staged, number = self._light(job), rows[0]["number"]
        table = pa.Table.from_pylist(list(rows), schema=STAGED_SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, STAGED_SCHEMA) as writer:
            writer.write_table(table)
        self.folder.write(_staged_name(self.staging(job), number), sink.getvalue())
        staged[number] = table.select(_LIGHT).to_pylist()

    def staged_rows(self, job: ShardJob, number: int) -> list[dict[str, Any]]:
        """What is staged of a sample: rows of STAGED_SCHEMA, one per window."""
        data = self.folder.read(_staged_name(self.staging(job), number))
        return list(pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist())

    def close_reading(self, job: ShardJob, summary: dict[str, Any]) -> None:
        """Keep what the reader says at the shard's end: `num_samples`, `truncated`, `error`."""
        self.folder.write(f"{self.staging(job)}/end.json", json.dumps(summary).encode())
        self._summaries[job.digest] = summary

    def summary(self, job: ShardJob) -> dict[str, Any] | None:
        """What the reader said at the shard's end, or None where it has not come there."""
        if job.digest not in self._summaries:
            try:
                said = json.loads(self.folder.read(f"{self.staging(job)}/end.json"))
            except FileNotFoundError:
                said = None
            self._summaries[job.digest] = said
        return self._summaries[job.digest]

    def commit_if_complete(self, job: ShardJob) -> bool:
        """Write the shard's files and manifest once all its samples are staged."""
        summary = self.summary(job)
        if summary is None or len(self._light(job)) < summary["num_samples"]:
            return False
        self._commit(job, summary)
        return True

    def _light(self, job: ShardJob) -> dict[int, list[dict[str, Any]]]:
        """What is held of the staged samples, by number; first found in the folder."""
        if job.digest not in self._staged:
            numbers = sorted(self.staged_numbers(job))
            found = map_at_once(lambda n: self.staged_rows(job, n), numbers, self.folder.threads)
            light = {
                rows[0]["number"]: [{name: row[name] for name in _LIGHT} for row in rows]
                for rows in found
            }
            self._staged[job.digest] = light
        return self._staged[job.digest]

    def _commit(self, job: ShardJob, summary: dict[str, Any]) -> None:
        staged = self._light(job)
        samples = [staged[number] for number in range(summary["num_samples"])]
        samples.sort(key=lambda rows: (rows[0]["key"].encode(), rows[0]["number"]))
        heads = [rows[0] for rows in samples]
        kept = [row for rows in samples for row in rows if row["status"] == "kept"]
        self._still_ours()
        old = self.manifest(job.name)
        # Without a manifest nobody reads files that are about to be replaced.
        self.folder.remove(f"manifests/{job.name}.json")
        files = [self._write("status", f"{job.name}.parquet", heads, STATUS_SCHEMA)]
        files += self._write_latents(job, kept)
        files.append(self.write_captions(job.name, kept))
        manifest = {
            "shard": job.name,
            "source": job.source,
            "fingerprint": job.fingerprint,
            "latent_digest": job.latent_digest,
            "caption_digest": job.caption_digest,
            "outcome_digest": job.outcome_digest,
            "encode_digest": job.encode_digest,
            "job": job.digest,
            **summary,
            "counts": dict(sorted(Counter(row["status"] for row in heads).items())),
            "reasons": dict(
                sorted(Counter(row["reason"] for row in heads if row["reason"]).items())
            ),
            "notes": _count_notes(heads),
            "files": files,
        }
        self.write_manifest(job.name, manifest)
        for entry in old["files"] if old is not None else ():
            if entry["path"] not in {new["path"] for new in files}:
                self.folder.remove(entry["path"])
        self.forget(job)

    def forget(self, job: ShardJob) -> None:
        """Remove what is held and staged of a finished job."""
        self._staged.pop(job.digest, None)
        self._summaries.pop(job.digest, None)
        self.sweep(job.name)

    def _still_ours(self) -> None:
        """Raises OutputBusy where the right to write was lost, as on a store that was long away."""
        if self._check is not None:
            try:
                self._check()
            except LockHeld as error:
                raise OutputBusy(
                    f"the lease on {shown(self.out)} ran out, as the store or this process stood "
                    "still for long; run the same command again"
                ) from error

    def write_captions(self, name: str, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """A shard's caption file; its entry counts the clips without a synthetic one, by code."""
        failed: Counter[str] = Counter()

        def counted() -> Iterator[dict[str, Any]]:
            for row in rows:
                if row["caption_error"]:
                    failed[row["caption_error"].partition(":")[0]] += 1
                yield row

        entry = self._write("captions", f"{name}.parquet", counted(), CAPTION_SCHEMA)
        return {**entry, "failed": dict(sorted(failed.items()))}

    def write_manifest(self, name: str, manifest: dict[str, Any]) -> None:
        """Make a shard's files the ones that count. Last of all."""
        self._still_ours()
        text = json.dumps(manifest, indent=1, sort_keys=True)
        self.folder.write(f"manifests/{name}.json", text.encode())

    def read_rows(self, path: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of an output file that a manifest names."""
        with self.folder.failing("read", path), self.folder.open(path) as file:
            chosen = None if columns is None else list(columns)
            return list(pq.read_table(file, columns=chosen).to_pylist())

    def _write_latents(self, job: ShardJob, kept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        by_bucket: dict[str, list[int]] = {}
        for row in kept:
            inside = by_bucket.setdefault(row["bucket"], [])
            if row["number"] not in inside[-1:]:
                inside.append(row["number"])
        entries = []
        for bucket, numbers in sorted(by_bucket.items()):
            found = map_at_once(lambda n: self.staged_rows(job, n), numbers, self.folder.threads)
            rows = (row for rows in found for row in rows)
            name = f"{job.name}.{bucket}.parquet"
            entries.append({**self._write("latents", name, rows, LATENT_SCHEMA), "bucket": bucket})
        return entries

    def _write(
        self, kind: str, base: str, rows: Iterable[dict[str, Any]], schema: pa.Schema
    ) -> dict[str, Any]:
        """One output file and its entry in the manifest."""
        name = f"{kind}/{base}"
        with self.folder.replacing(name) as partial:
            count = write_rows(partial, rows, schema)
            digest = sha256_of(partial)
        return {"kind": kind, "path": name, "rows": count, "sha256": digest}

    def sweep(self, name: str) -> None:
        """Remove what a finished shard left in staging."""
        self.folder.remove_folder(f"staging/{name}")

    def changed_settings(self, settings: dict[str, Any]) -> str:
        """The settings that differ from those the output was begun with, for people; "" where none does."""
        if not self.folder.exists("dataset.json"):
            return ""
        before = _flat(read_info_values(self.out).get("settings", {}))
        now = _flat(settings)
        names = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        return ", ".join(f"{k}: {before.get(k)!r} → {now.get(k)!r}" for k in names)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Hold the settings against those that the output was begun with.

        Raises:
            SettingsChanged: naming every setting that differs.
        """
        if changes := self.changed_settings(settings):
            raise SettingsChanged(
                f"{shown(self.out)} was prepared with other settings ({changes}); choose another output, set them back, or "
                "prepare with --redo, which makes anew what they affect"
            )


def _count_notes(heads: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Kept samples by what was odd about them: the word before the first colon of their detail."""
    noted = [row["detail"] for row in heads if row["status"] == "kept" and row["detail"]]
    return dict(sorted(Counter(detail.partition(":")[0] for detail in noted).items()))


@contextmanager
def _held(
    folder: Folder, name: str, busy: str, *, wait_s: float = 0.0
) -> Iterator[Callable[[], None]]:
    lock = folder.lock(name, wait_s=wait_s)
    try:
        check = lock.__enter__()
    except LockHeld as error:
        raise OutputBusy(busy) from error
    try:
        yield check
    finally:
        lock.__exit__(None, None, None)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _staged_name(folder: str, number: int) -> str:
    return f"{folder}/{number:08d}.arrow"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
