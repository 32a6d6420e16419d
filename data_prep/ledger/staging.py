"""Finished samples of unfinished shards: they survive a kill and are not computed again.

    OUT/staging/SHARD/DIGEST/NUMBER.arrow   rows of STAGED_SCHEMA, one per window of frames
    OUT/staging/SHARD/DIGEST/end.json       what the reader says at the shard's end

DIGEST is that of the job, so that samples of other settings never mix. Samples may arrive in any
order and more than once. Knows nothing of how a sample is made, or of what becomes of the files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from data_prep.latents.records import CAPTION_SCHEMA, LATENT_SCHEMA, STATUS_SCHEMA
from data_prep.ledger.job import ShardJob
from data_prep.row import Row
from data_prep.sources.samples import ShardSummary
from data_prep.storage.folder import Folder, map_at_once

STAGING = "staging"
"""The folder of staged samples, below the output."""

_LATENT_FIELDS = [f for f in LATENT_SCHEMA if f.name not in ("key", "number")]
_CAPTION_FIELDS = [f for f in CAPTION_SCHEMA if f.name not in ("key", "window")]
STAGED_SCHEMA = pa.schema(
    [*STATUS_SCHEMA, *(f.with_nullable(True) for f in (*_LATENT_FIELDS, *_CAPTION_FIELDS))]
)
"""A finished sample: its status and, if it is kept, its latents and captions."""
_LIGHT = [f.name for f in STAGED_SCHEMA if f.name not in ("mean", "logvar", "pts_s", "shape")]
"""The columns that are held in memory of the staged samples of shards in flight."""


class Staging:
    """The staged samples of an output.

    >>> import tempfile
    >>> from data_prep.storage.store import open_folder
    >>> staging = Staging(open_folder(tempfile.mkdtemp()))
    >>> job = ShardJob("00000", "/data/00000.tar", "size:9 mtime_ns:1", "aa", "bb")
    >>> row = {"key": "a", "shard": "00000", "number": 3, "status": "failed",
    ...        "reason": "empty_video", "detail": "it has 0 bytes"}
    >>> staging.put(job, [row])
    >>> staging.numbers(job), staging.shards()
    ({3}, ['00000'])
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._light: dict[str, dict[int, list[Row]]] = {}
        self._summaries: dict[str, ShardSummary | None] = {}

    def shards(self) -> list[str]:
        """Names of the shards of which something is staged."""
        return self.folder.folders(STAGING)

    def numbers(self, job: ShardJob) -> set[int]:
        """Numbers of the samples that an earlier run, or this one, has finished."""
        bases = (base.partition(".") for base in self.folder.names(_folder(job)))
        return {int(stem) for stem, _, suffix in bases if suffix == "arrow" and stem.isdigit()}

    def put(self, job: ShardJob, rows: Sequence[Row]) -> None:
        """Stage one finished sample: rows of STAGED_SCHEMA, one per window, all of one number."""
        light, number = self.light_rows(job), rows[0]["number"]
        table = pa.Table.from_pylist(list(rows), schema=STAGED_SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, STAGED_SCHEMA) as writer:
            writer.write_table(table)
        self.folder.write(_name(job, number), sink.getvalue())
        light[number] = table.select(_LIGHT).to_pylist()

    def rows(self, job: ShardJob, number: int) -> list[Row]:
        """The rows of a staged sample, one per window."""
        data = self.folder.read(_name(job, number))
        return list(pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist())

    def light_rows(self, job: ShardJob) -> dict[int, list[Row]]:
        """The rows of all staged samples by number, without their moments.

        They are read from the folder once and then held in memory.
        """
        if job.digest not in self._light:
            numbers = sorted(self.numbers(job))
            samples = map_at_once(lambda n: self.rows(job, n), numbers, self.folder.threads)
            self._light[job.digest] = {
                rows[0]["number"]: [{name: row[name] for name in _LIGHT} for row in rows]
                for rows in samples
            }
        return self._light[job.digest]

    def end(self, job: ShardJob, summary: ShardSummary) -> None:
        """Keep what the reader says at the shard's end."""
        self.folder.write(f"{_folder(job)}/end.json", json.dumps(asdict(summary)).encode())
        self._summaries[job.digest] = summary

    def summary(self, job: ShardJob) -> ShardSummary | None:
        """What the reader said at the shard's end; None if it has not come there."""
        if job.digest not in self._summaries:
            try:
                values = json.loads(self.folder.read(f"{_folder(job)}/end.json"))
                summary = ShardSummary(**values)
            except FileNotFoundError:
                summary = None
            self._summaries[job.digest] = summary
        return self._summaries[job.digest]

    def forget(self, job: ShardJob) -> None:
        """Remove what is held and staged of a finished job."""
        self._light.pop(job.digest, None)
        self._summaries.pop(job.digest, None)
        self.sweep(job.name)

    def sweep(self, shard: str) -> None:
        """Remove all that is staged of a finished shard."""
        self.folder.remove_folder(f"{STAGING}/{shard}")


def _folder(job: ShardJob) -> str:
    return f"{STAGING}/{job.name}/{job.digest}"


def _name(job: ShardJob, number: int) -> str:
    return f"{_folder(job)}/{number:08d}.arrow"
