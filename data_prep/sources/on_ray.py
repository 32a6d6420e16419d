"""Shards as a data source of Ray Data: only the wiring. Rows are read by `data_prep.stages`.

Knows nothing of what makes a sample good or bad.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ray.data import DataContext
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from data_prep.config import PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.ledger.recaption import numbers_to_skip
from data_prep.ledger.staging import Staging
from data_prep.row import ROW_SCHEMA, Row, table_of
from data_prep.stages import read_rows
from data_prep.storage.store import open_folder
from data_prep.storage.uris import Location, recorded


class ShardSource(Datasource):
    """A Ray Data source of tars and folders: one read task per shard that is not finished.

    Unlike `ray.data.read_webdataset` it salvages truncated tars and can resume: a finished shard
    never becomes a task, and a staged sample is not emitted again.
    """

    def __init__(self, jobs: Sequence[ShardJob], config: PrepareConfig, out: Location) -> None:
        super().__init__()
        self._jobs = list(jobs)
        self._config = config
        self._staging = Staging(open_folder(out))

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before the shards are read."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task per shard, whatever parallelism Ray asks for: a tar is read front to back."""
        # What is staged is looked up here, once. A task that Ray repeats must give the same blocks
        # again, because Ray drops as many of them as it had before.
        begun_shards = set(self._staging.shards())
        return [
            ReadTask(
                partial(_read_blocks, job, self._config, self._numbers_to_skip(job, begun_shards)),
                BlockMetadata(
                    num_rows=None,
                    size_bytes=None,
                    input_files=[recorded(job.source)],
                    exec_stats=None,
                ),
                schema=ROW_SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for job in self._jobs
        ]

    def _numbers_to_skip(self, job: ShardJob, begun_shards: set[str]) -> set[int]:
        # Most shards have nothing staged, and asking a store for each would take a request.
        if job.encode and job.name not in begun_shards:
            return set()
        return numbers_to_skip(self._staging, job)


def _read_blocks(job: ShardJob, config: PrepareConfig, skip: set[int]) -> Iterator[Block]:
    """Small blocks, so that the first sample is decoded while the last is still being read."""
    rows: list[Row] = []
    size_bytes = 0
    for row in read_rows(job, config, skip):
        rows.append(row)
        size_bytes += len(row["media"] or b"")
        if size_bytes >= config.concurrency.block_bytes:
            yield table_of(rows)
            rows, size_bytes = [], 0
    if rows:
        yield table_of(rows)
