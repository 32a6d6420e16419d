"""What is done: one manifest per input shard, and how a shard gets there whole.

    OUT/staging/SHARD/DIGEST/NUMBER.arrow   finished samples of shards that are not
    OUT/manifests/SHARD.json                written last; the only truth about what is done

Every file is written under another name, synced, then renamed. Samples of a shard may arrive in any
order and more than once; when all numbers are there the shard's files are written in key order and
its manifest last. Kill it at any moment: staged samples are found again, and the bytes come out the
same. Knows nothing of Ray or of how a sample is made.

    LedgerError(ValueError)
    ├── OutputBusy          another run holds the output's lock
    └── SettingsChanged     the output was prepared with other settings
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.config import digest_of
from data_prep.inputs import content_sha256, fingerprint
from data_prep.latents import (
    CAPTION_SCHEMA,
    LATENT_SCHEMA,
    STATUS_SCHEMA,
    read_info_values,
    write_rows,
)

_LATENT_FIELDS = [f for f in LATENT_SCHEMA if f.name not in ("key", "number")]
_CAPTION_FIELDS = [f for f in CAPTION_SCHEMA if f.name not in ("key", "window")]
STAGED_SCHEMA = pa.schema(
    [*STATUS_SCHEMA, *(f.with_nullable(True) for f in (*_LATENT_FIELDS, *_CAPTION_FIELDS))]
)
"""A finished sample: its status, and, where kept, its latents and captions."""


class LedgerError(ValueError):
    """The output folder cannot be used as it stands."""


class OutputBusy(LedgerError):
    """Another run is writing to the same output."""


class SettingsChanged(LedgerError):
    """The output holds what other settings made."""


@dataclass(frozen=True)
class ShardJob:
    """An input shard and what decides its output. Small and picklable."""

    name: str
    source: str
    fingerprint: str
    latent_digest: str
    caption_digest: str
    encode: bool = True
    """False where the latents stand and only captions are missing (`data_prep.recaption`)."""
    replaces: str = ""
    """Of a captions-only job: the job whose captions it replaces, so that each try is a job of its own."""

    @property
    def digest(self) -> str:
        """Names the staging folder: other inputs or settings never mix with it."""
        values = [self.fingerprint, self.latent_digest, self.caption_digest, str(self.encode)]
        values += [self.replaces] if self.replaces else []
        return digest_of({"job": values})


def caption_job(job: ShardJob, done: dict[str, Any]) -> ShardJob:
    """The job as one of captions only, given the manifest that stands."""
    return replace(job, encode=False, replaces=done["job"])


@dataclass
class Ledger:
    """The output folder of `prepare`."""

    out: Path
    _staged: dict[str, set[int]] = field(default_factory=dict)

    def manifest_path(self, name: str) -> Path:
        return self.out / "manifests" / f"{name}.json"

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a finished shard, or None."""
        try:
            return dict(json.loads(self.manifest_path(name).read_text()))
        except FileNotFoundError:
            return None

    def job(
        self,
        name: str,
        source: str,
        latent_digest: str,
        caption_digest: str,
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
        same = done is not None and done["latent_digest"] == latent_digest
        if done is not None and same:
            if verify:
                same = done["sha256"] == content_sha256(source)
            else:
                same = done["fingerprint"] == seen
        if done is not None and same and done["caption_digest"] == caption_digest:
            return None
        job = ShardJob(name, source, seen, latent_digest, caption_digest)
        return caption_job(job, done) if done is not None and same else job

    def is_done(self, job: ShardJob) -> bool:
        """Whether the manifest of exactly this job stands."""
        done = self.manifest(job.name)
        return done is not None and done["job"] == job.digest

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the output for one run; the kernel lets go of it when the process dies.

        Raises:
            OutputBusy: another process holds it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputBusy(
                    f"another run is writing to {self.out}; wait for it, or choose another output"
                ) from error
            yield

    def staging(self, job: ShardJob) -> Path:
        return self.out / "staging" / job.name / job.digest

    def staged_numbers(self, job: ShardJob) -> set[int]:
        """Numbers of the samples that an earlier run, or this one, has finished."""
        return {int(path.stem) for path in self.staging(job).glob("[0-9]*.arrow")}

    def stage(self, job: ShardJob, rows: Sequence[dict[str, Any]]) -> None:
        """Keep one finished sample: rows of STAGED_SCHEMA, one per window, all of one number."""
        folder = self.staging(job)
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(list(rows), schema=STAGED_SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, STAGED_SCHEMA) as writer:
            writer.write_table(table)
        number = rows[0]["number"]
        write_atomically(folder / f"{number:08d}.arrow", sink.getvalue())
        self._numbers(job).add(number)

    def staged_rows(self, job: ShardJob, number: int) -> list[dict[str, Any]]:
        """What is staged of a sample: rows of STAGED_SCHEMA."""
        return _read_staged(self.staging(job) / f"{number:08d}.arrow", STAGED_SCHEMA.names)

    def close_reading(self, job: ShardJob, summary: dict[str, Any]) -> None:
        """Keep what the reader says at the shard's end: `num_samples`, `truncated`, `error`."""
        folder = self.staging(job)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "end.json", json.dumps(summary).encode())

    def commit_if_complete(self, job: ShardJob) -> bool:
        """Write the shard's files and manifest once all its samples are staged."""
        end = self.staging(job) / "end.json"
        if not end.is_file():
            return False
        summary = json.loads(end.read_text())
        if len(self._numbers(job)) < summary["num_samples"]:
            return False
        self._commit(job, summary)
        return True

    def _numbers(self, job: ShardJob) -> set[int]:
        if job.digest not in self._staged:
            self._staged[job.digest] = self.staged_numbers(job)
        return self._staged[job.digest]

    def _commit(self, job: ShardJob, summary: dict[str, Any]) -> None:
        heads = []
        for number in range(summary["num_samples"]):
            rows = _read_staged(self.staging(job) / f"{number:08d}.arrow", STATUS_SCHEMA.names)
            heads.append(rows[0])
        heads.sort(key=lambda row: (row["key"].encode(), row["number"]))
        files = [self._write_status(job, heads)]
        # Without a manifest nobody reads files that are about to be replaced.
        self.manifest_path(job.name).unlink(missing_ok=True)
        kept = [row["number"] for row in heads if row["status"] == "kept"]
        files += self._write_latents(job, kept)
        files.append(self.write_captions(job.name, self._rows(job, kept, CAPTION_SCHEMA)))
        manifest = {
            "shard": job.name,
            "source": job.source,
            "fingerprint": job.fingerprint,
            "latent_digest": job.latent_digest,
            "caption_digest": job.caption_digest,
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
        self._forget(job, files)

    def _write_status(self, job: ShardJob, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._write("status", f"{job.name}.parquet", iter(rows), STATUS_SCHEMA)

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
        text = json.dumps(manifest, indent=1, sort_keys=True)
        write_atomically(self.manifest_path(name), text.encode())

    def _write_latents(self, job: ShardJob, numbers: Sequence[int]) -> list[dict[str, Any]]:
        by_bucket: dict[str, list[int]] = {}
        for number in numbers:
            path = self.staging(job) / f"{number:08d}.arrow"
            by_bucket.setdefault(_read_staged(path, ["bucket"])[0]["bucket"], []).append(number)
        entries = []
        for bucket, inside in sorted(by_bucket.items()):
            rows = self._rows(job, inside, LATENT_SCHEMA)
            name = f"{job.name}.{bucket}.parquet"
            entries.append({**self._write("latents", name, rows, LATENT_SCHEMA), "bucket": bucket})
        return entries

    def _rows(
        self, job: ShardJob, numbers: Sequence[int], schema: pa.Schema
    ) -> Iterator[dict[str, Any]]:
        for number in numbers:
            yield from _read_staged(self.staging(job) / f"{number:08d}.arrow", schema.names)

    def _write(
        self, kind: str, name: str, rows: Iterator[dict[str, Any]], schema: pa.Schema
    ) -> dict[str, Any]:
        """One output file and its entry in the manifest."""
        path = self.out / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        try:
            count = write_rows(partial, rows, schema)
            digest = sha256_of(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return {"kind": kind, "path": f"{kind}/{name}", "rows": count, "sha256": digest}

    def _forget(self, job: ShardJob, files: Sequence[dict[str, Any]]) -> None:
        """Remove the staged samples, and files that an older version of the shard left."""
        current = {entry["path"] for entry in files}
        for path in (self.out / "latents").glob("*.parquet"):
            ours = path.name.rpartition(".parquet")[0].rpartition(".")[0] == job.name
            if ours and f"latents/{path.name}" not in current:
                path.unlink(missing_ok=True)
        self._staged.pop(job.digest, None)
        self.sweep(job.name)

    def sweep(self, name: str) -> None:
        """Remove what a finished shard left in staging."""
        shutil.rmtree(self.out / "staging" / name, ignore_errors=True)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Hold the settings against those that the output was begun with.

        Raises:
            SettingsChanged: naming every setting that differs.
        """
        if not (self.out / "dataset.json").is_file():
            return
        before = _flat(read_info_values(self.out).get("settings", {}))
        now = _flat(settings)
        names = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        if names:
            changes = ", ".join(f"{k}: {before.get(k)!r} → {now.get(k)!r}" for k in names)
            raise SettingsChanged(
                f"{self.out} was prepared with other settings ({changes}); "
                "choose another output, or set them back"
            )


def _count_notes(heads: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Kept samples by what was odd about them: the word before the first colon of their detail."""
    noted = [row["detail"] for row in heads if row["status"] == "kept" and row["detail"]]
    return dict(sorted(Counter(detail.partition(":")[0] for detail in noted).items()))


def write_atomically(path: Path, data: bytes | pa.Buffer) -> None:
    """Write, sync, rename: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_staged(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        return list(table.select(list(names)).to_pylist())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
