"""The last stage: finished rows are staged, and shards that are whole are committed.

There is one of it in a run, and nobody else writes. Knows nothing of Ray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np

from data_prep.config import PrepareConfig
from data_prep.latents.records import Bucket, LatentRecord
from data_prep.ledger.commit import Committer
from data_prep.ledger.job import ShardJob
from data_prep.ledger.recaption import commit_captions_if_complete
from data_prep.ledger.staging import Staging
from data_prep.row import Row, decided, is_closing, join_windows, split_windows
from data_prep.sources.samples import ShardSummary
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder


class SinkStage:
    """Stages finished rows and commits shards that are whole.

    Args:
        config: the settings.
        out: the output, a path or URI.
        jobs: those of the run.
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
        self.jobs = {job.name: job for job in jobs}
        self.folder = open_folder(out)
        self.staging = Staging(self.folder)
        self.committer = Committer(self.folder, self.staging, still_ours)
        self._is_committed: dict[str, bool] = {}

    def accept(self, row: Row) -> bool:
        """Take one row; True if it completed its shard. Rows of committed shards are ignored."""
        job = self.jobs[row["shard"]]
        if job.name not in self._is_committed:
            # Looked up once, because this is the run's only writer.
            self._is_committed[job.name] = job.is_committed(self.folder)
        if self._is_committed[job.name]:
            return False
        if is_closing(row):
            self.staging.end(job, ShardSummary(**json.loads(row["closing"])))
        else:
            if not job.encode and not row["status"]:
                row = join_windows([_kept(part) for part in split_windows(row)])
            self.staging.put(job, self._staged(row))
        if job.encode:
            is_committed = self.committer.commit_if_complete(job)
        else:
            is_committed = commit_captions_if_complete(self.committer, job)
        self._is_committed[job.name] = is_committed
        return is_committed

    def _staged(self, row: Row) -> list[Row]:
        """The rows to stage of a sample: one per window that is kept, but at least one."""
        names = ("key", "shard", "number", "status", "reason", "detail", "source_digest")
        head: Row = {name: row[name] for name in names}
        if row["status"] != "kept":
            return [head]
        rows = []
        for part in split_windows(row):
            if part["status"] != "kept":
                continue
            texts = ("window", "caption", "synthetic", "captioner", "caption_error")
            staged_row = {**head, **{name: part[name] for name in texts}}
            if part["mean"] is not None:
                staged_row |= {**self._record(part).row(), **head}
            rows.append(staged_row)
        return rows

    def _record(self, row: Row) -> LatentRecord:
        frames, height, width = row["frames_shape"][:3]
        shape = row["latent_shape"]
        moments = {
            name: np.frombuffer(row[name], dtype="<f2").reshape(shape) if row[name] else None
            for name in ("mean", "logvar")
        }
        mean = moments["mean"]
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
            logvar=moments["logvar"],
            codec=row["codec"],
            look=row["look"],
            bars=tuple(row["bars"]),
            frames_digest=row["frames_digest"],
        )


def _kept(row: Row) -> Row:
    """A window that came through a run without an encoder, which would have decided it."""
    return row if row["status"] else decided(row, "kept", "", "")
