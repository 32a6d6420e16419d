"""The last stage: finished rows are staged, and shards that are whole are committed.

A run has one of it or several, each for shards of its own (`sink_of`); nobody else writes. What a
block completes is not staged first. Moments stay where Arrow has them: they are sliced, never made
into Python values. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.config import PrepareConfig
from data_prep.latents.records import MOMENTS, Bucket, LatentRecord
from data_prep.ledger.commit import Committer
from data_prep.ledger.errors import LedgerError
from data_prep.ledger.job import ShardJob
from data_prep.ledger.manifest import Manifest, read_manifest
from data_prep.ledger.recaption import commit_captions, numbers_to_caption
from data_prep.ledger.staging import STAGED_SCHEMA, Staging
from data_prep.row import PAYLOAD, Row, buffers_of, decided, join_windows, window_tables
from data_prep.sources.samples import ShardSummary
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder

_CLOSING = -1
"""Stands for the shard's end among the numbers of the samples that are being written."""


def sink_of(shard: str, sinks: int) -> int:
    """Which of so many sinks has a shard, from 0; the same in every process.

    >>> [sink_of(f"{number:05d}", 3) for number in range(6)]
    [1, 2, 1, 1, 1, 0]
    """
    return int.from_bytes(hashlib.sha256(shard.encode()).digest()[:8], "big") % sinks


@dataclass
class _Shard:
    """What is going on with a shard. All but `job` and `free` belongs to who holds `free`."""

    job: ShardJob
    free: Condition = field(default_factory=Condition)
    is_looked_up: bool = False
    is_committed: bool = False
    old: Manifest | None = None
    """The manifest that stood when the first row came."""
    in_flight: set[int] = field(default_factory=set)
    """Samples that a thread is writing, with `_CLOSING` for the shard's end."""
    wanted: set[int] | None = None
    """Samples without which the shard is not whole; None until the reader has come to its end."""


class _Piece(NamedTuple):
    """A row of a table, and the table, which holds its moments."""

    row: Row
    """Without the payload."""
    table: pa.Table
    at: int


class SinkStage:
    """Stages finished rows and commits shards that are whole. Several threads may call it.

    Args:
        config: the settings.
        out: the output, a path or URI.
        jobs: those of the run whose shards this sink has.
        still_ours: raises if the right to write was lost (`data_prep.ledger.locks.lock_writing`).
    """

    def __init__(
        self,
        config: PrepareConfig,
        out: Location,
        jobs: Sequence[ShardJob],
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.folder = open_folder(out)
        self.staging = Staging(self.folder)
        self.committer = Committer(self.folder, self.staging, still_ours)
        self._shards = {job.name: _Shard(job) for job in jobs}

    def accept(self, block: pa.Table) -> set[str]:
        """Take a block of finished rows; the shards among theirs that it completed.

        The rows are safe when this returns. Those of finished shards, and of samples that are
        staged, are ignored: a block may come again.

        Args:
            block: rows of ROW_SCHEMA (`data_prep.row`), of any number of shards.

        Raises:
            StorageError: the disk or the store failed.
            OutputBusy: the right to write was lost.
        """
        places: dict[str, list[int]] = {}
        for place, name in enumerate(block["shard"].to_pylist()):
            places.setdefault(name, []).append(place)
        return {
            name for name, own in places.items() if self._accept(self._shards[name], block, own)
        }

    def _accept(self, shard: _Shard, block: pa.Table, places: list[int]) -> bool:
        job, staging = shard.job, self.staging
        numbers = block["number"].to_pylist()
        with shard.free:
            self._look_up(shard)
            # A repeated sample is safe only once the thread that has it is done.
            shard.free.wait_for(lambda: not shard.in_flight & {numbers[at] for at in places})
            if shard.is_committed:
                return False
            summary = self._summary(shard, block, places)
            samples = staging.samples(job)
            new = {numbers[at]: at for at in reversed(places) if numbers[at] >= 0}
            fresh = sorted(number for number in new if number not in samples)
            table = self._staged(job, block, [new[number] for number in fresh])
            if not shard.in_flight and self._is_whole(shard, fresh):
                staging.add(job, table, "")
                return self._commit(shard)
            shard.in_flight |= {*fresh, *([_CLOSING] if summary else [])}
        try:
            written = staging.write(job, table) if fresh else []
            if summary:
                staging.end(job, summary)
        except BaseException:
            self._land(shard, fresh, summary)
            raise
        with shard.free:
            for base, part in written:
                staging.add(job, part, base)
            self._land(shard, fresh, summary)
            return not shard.in_flight and self._is_whole(shard) and self._commit(shard)

    @staticmethod
    def _land(shard: _Shard, numbers: Iterable[int], summary: ShardSummary | None) -> None:
        with shard.free:
            shard.in_flight -= {*numbers, *([_CLOSING] if summary else [])}
            shard.free.notify_all()

    def _look_up(self, shard: _Shard) -> None:
        """Read what stands of a shard; once, because nobody else writes it."""
        if shard.is_looked_up:
            return
        shard.old = read_manifest(self.folder, shard.job.name)
        shard.is_committed = shard.old is not None and shard.old.job == shard.job.digest
        if not shard.is_committed:
            if not shard.job.encode and shard.old is None:
                raise LedgerError(
                    f"the manifest of shard {shard.job.name} went away while it was captioned; "
                    "run again"
                )
            self._want(shard, self.staging.summary(shard.job))
        shard.is_looked_up = True

    def _summary(
        self, shard: _Shard, block: pa.Table, places: Sequence[int]
    ) -> ShardSummary | None:
        """What the block says of the shard's end, if it says it first."""
        texts = [block["closing"][at].as_py() for at in places if block["number"][at].as_py() < 0]
        if not texts or shard.wanted is not None:
            return None
        summary = ShardSummary(**json.loads(texts[0]))
        self._want(shard, summary)
        return summary

    def _want(self, shard: _Shard, summary: ShardSummary | None) -> None:
        """Take note of what the shard is whole with."""
        if summary is None:
            return
        numbers = set(range(summary.num_samples))
        if not shard.job.encode:
            assert shard.old is not None
            numbers &= numbers_to_caption(self.folder, shard.job, shard.old)
        self.staging.note_end(shard.job, summary)
        shard.wanted = numbers

    def _is_whole(self, shard: _Shard, fresh: Iterable[int] = ()) -> bool:
        """Whether all samples are staged, with those that are fresh."""
        if shard.wanted is None:
            return False
        return shard.wanted <= self.staging.samples(shard.job).keys() | set(fresh)

    def _commit(self, shard: _Shard) -> bool:
        if shard.job.encode:
            self.committer.commit(shard.job, shard.old)
        else:
            assert shard.old is not None
            commit_captions(self.committer, shard.job, shard.old)
        shard.is_committed = True
        return True

    def _staged(self, job: ShardJob, block: pa.Table, places: Sequence[int]) -> pa.Table:
        """Rows of STAGED_SCHEMA of samples: one per window that is kept, but at least one."""
        rows: list[Row] = []
        moments: dict[str, list[tuple[pa.Table, int] | None]] = {name: [] for name in MOMENTS}
        for piece in _pieces(block, places):
            for row, source in self._staged_rows(job, piece):
                rows.append(row)
                for name in MOMENTS:
                    moments[name].append(source)
        light = pa.Table.from_pylist(rows, schema=STAGED_SCHEMA)
        for name in MOMENTS:
            column = STAGED_SCHEMA.get_field_index(name)
            light = light.set_column(
                column, STAGED_SCHEMA.field(column), _gathered(moments[name], name)
            )
        return light

    def _staged_rows(
        self, job: ShardJob, piece: _Piece
    ) -> list[tuple[Row, tuple[pa.Table, int] | None]]:
        """The rows to stage of a sample, without moments, and where its moments are."""
        row, parts = piece.row, _windows(piece)
        if not job.encode and not row["status"]:
            # A run without an encoder, which would have decided it.
            parts = [part._replace(row=_kept(part.row)) for part in parts]
            row = join_windows([part.row for part in parts])
        names = ("key", "shard", "number", "status", "reason", "detail", "source_digest")
        head: Row = {name: row[name] for name in names}
        if row["status"] != "kept":
            return [(head, None)]
        staged: list[tuple[Row, tuple[pa.Table, int] | None]] = []
        for part, table, at in parts:
            if part["status"] != "kept":
                continue
            texts = ("window", "caption", "synthetic", "captioner", "caption_error")
            staged_row = {**head, **{name: part[name] for name in texts}}
            if table["mean"].slice(at, 1).null_count:
                staged.append((staged_row, None))
                continue
            facts = self._record(part, table, at).facts()
            staged.append(({**staged_row, **facts, **head}, (table, at)))
        return staged

    def _record(self, row: Row, table: pa.Table, at: int) -> LatentRecord:
        """A window's record; its moments are views of the table's memory."""
        frames, height, width = row["frames_shape"][:3]
        shape = row["latent_shape"]
        buffers = (buffers_of(table[name].slice(at, 1))[0] for name in MOMENTS)
        mean, logvar = (
            np.frombuffer(buffer, dtype="<f2").reshape(shape) if buffer is not None else None
            for buffer in buffers
        )
        assert mean is not None
        assert math.prod(shape) == mean.size
        return LatentRecord(
            key=row["key"],
            window=row["window"],
            number=row["number"],
            bucket=Bucket(frames, height, width),
            fps=self.config.bucket.fps,
            pts_s=row["pts_s"],
            mean=mean,
            logvar=logvar,
            codec=row["codec"],
            look=row["look"],
            bars=tuple(row["bars"]),
            frames_digest=row["frames_digest"],
        )


def _kept(row: Row) -> Row:
    return row if row["status"] else decided(row, "kept", "", "")


def _pieces(table: pa.Table, places: Sequence[int]) -> list[_Piece]:
    """Some rows of a table of ROW_SCHEMA."""
    light = table.select([n for n in table.column_names if n not in (*PAYLOAD, "windows")])
    rows = light.take(pa.array(places, pa.int64())).to_pylist()
    return [_Piece(row, table, at) for row, at in zip(rows, places, strict=True)]


def _windows(piece: _Piece) -> list[_Piece]:
    """One piece per window of a carrier (`data_prep.row`); any other by itself."""
    parts: list[_Piece] = []
    for table in window_tables(piece.table, piece.at):
        parts += _pieces(table, range(len(table)))
    return parts or [piece]


def _gathered(sources: Sequence[tuple[pa.Table, int] | None], name: str) -> pa.ChunkedArray:
    """A column of moments, put together of slices of other tables; None is a null."""
    kind = STAGED_SCHEMA.field(name).type
    chunks: list[pa.Array] = []
    first = 0
    while first < len(sources):
        end, source = first + 1, sources[first]
        if source is None:
            chunks.append(pa.nulls(1, kind))
        else:
            # Rows that follow one another stay one slice.
            table, at = source
            while end < len(sources) and sources[end] == (table, at + end - first):
                end += 1
            chunks += table[name].slice(at, end - first).chunks
        first = end
    return pa.chunked_array(chunks, kind)
