"""Data preparation on Ray Data: only the wiring. What happens to a sample is in `data_prep.stages`.

    ShardSource (one read task per tar) → Decode → Filter → Caption → Encode → Sink

Each stage is a Ray Data operator of its own: actor pools never fuse with one another, and the read
task's CPU share differs from the decoder's. All of it streams; shards in flight are bounded by the
number of read tasks. The caller starts Ray. Does not know what makes a sample good or bad.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from data_prep.config import PrepareConfig
from data_prep.ledger import Ledger, ShardJob
from data_prep.resources import StageResources, describe, plan_resources
from data_prep.run import PrepareReport, RunPlan, plan_run, report_of
from data_prep.stages import (
    ROW_SCHEMA,
    CaptionStage,
    DecodeStage,
    EncodeStage,
    FilterStage,
    Row,
    SinkStage,
    Stage,
    read_rows,
    run_stage,
)

log = logging.getLogger("flowreel.prepare")

Progress = Callable[[str, int, int | None], None]
"""progress(stage, done, total): stage is "samples" (total None: not known before the end of the
shards) or "shards"."""

_BLOCK_ROWS = 4
_BLOCK_BYTES = 32 * 2**20
_DONE_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("number", pa.int32()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("committed", pa.bool_()),
    ]
)


class ShardSource(Datasource):
    """Ray Data source of WebDataset tars: one read task per shard that is not done.

    Unlike `ray.data.read_webdataset` it salvages truncated tars and can resume: finished shards
    never become a task, staged samples are not emitted again.
    """

    def __init__(self, jobs: Sequence[ShardJob], config: PrepareConfig, out: Path) -> None:
        super().__init__()
        self._jobs = list(jobs)
        self._config = config
        self._out = str(out)

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
        return [
            ReadTask(
                partial(_read_blocks, job, self._config, self._out),
                BlockMetadata(
                    num_rows=None, size_bytes=None, input_files=[job.source], exec_stats=None
                ),
                schema=ROW_SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for job in self._jobs
        ]


def _read_blocks(job: ShardJob, config: PrepareConfig, out: str) -> Iterator[Block]:
    """Small blocks, so that the first sample is decoded while the last is still being read."""
    ledger = Ledger(Path(out))
    if ledger.is_done(job):
        return
    rows: list[Row] = []
    size_bytes = 0
    for row in read_rows(job, config, ledger.staged_numbers(job)):
        rows.append(row)
        size_bytes += len(row["media"] or b"")
        if len(rows) >= _BLOCK_ROWS or size_bytes >= _BLOCK_BYTES:
            yield _table(rows)
            rows, size_bytes = [], 0
    if rows:
        yield _table(rows)


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=ROW_SCHEMA)


class _Operator:
    """A stage as Ray Data wants it: one row at a time in, one table a row out."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            yield _table([run_stage(self._stage, row)])


class Decode(_Operator):
    """`DecodeStage` as an actor."""

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__(DecodeStage(config))


class Filter(_Operator):
    """`FilterStage` as an actor."""

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__(FilterStage(config))


class Caption(_Operator):
    """`CaptionStage` as an actor."""

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__(CaptionStage(config))


class Encode(_Operator):
    """`EncodeStage` as an actor, on the GPU where Ray gave it one."""

    def __init__(self, config: PrepareConfig, codec: str, skip: frozenset[str]) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        super().__init__(EncodeStage(config, codec, skip, device))


class Sink:
    """`SinkStage` as the run's only writer; says what it took."""

    def __init__(self, config: PrepareConfig, out: str, jobs: tuple[ShardJob, ...]) -> None:
        self._stage = SinkStage(config, out, jobs)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            done = {name: row[name] for name in ("shard", "number", "status", "reason")}
            done["committed"] = self._stage.accept(row)
            yield pa.Table.from_pylist([done], schema=_DONE_SCHEMA)


def build_pipeline(
    plan: RunPlan, config: PrepareConfig, resources: dict[str, StageResources]
) -> Dataset:
    """The dataset of six operators; nothing runs before it is iterated."""
    read = resources["read"]
    rows = ray.data.read_datasource(
        ShardSource(plan.jobs, config, plan.out),
        num_cpus=read.cpus,
        compute=TaskPoolStrategy(size=read.workers),
        override_num_blocks=len(plan.jobs),
    )
    skip = frozenset(job.name for job in plan.jobs if not job.encode)
    stages: list[tuple[str, type, tuple[Any, ...]]] = [
        ("decode", Decode, (config,)),
        ("filter", Filter, (config,)),
        ("caption", Caption, (config,)),
        ("encode", Encode, (config, plan.codec, skip)),
        ("sink", Sink, (config, str(plan.out), plan.jobs)),
    ]
    for name, operator, arguments in stages:
        need = resources[name]
        rows = rows.map_batches(
            operator,
            fn_constructor_args=arguments,
            compute=ActorPoolStrategy(size=need.workers),
            num_cpus=need.cpus,
            num_gpus=need.gpus or None,
            batch_size=1 if need.gpus else None,
            batch_format="pyarrow",
        )
    return rows


def prepare(
    config: PrepareConfig,
    shards: Sequence[str],
    out: Path,
    codec: Path | str,
    *,
    progress: Progress | None = None,
) -> PrepareReport:
    """Video shards → latent shards. Ray must be running where anything is left to do.

    May be killed at any moment and run again: the output is the same, byte for byte, and finished
    work is not done twice. With nothing left it returns at once and does not touch Ray.

    Args:
        config: the settings.
        shards: WebDataset tars, local paths or URIs that pyarrow opens.
        out: output folder, read by `data_prep.latents.LatentDataset`.
        codec: folder or hub id for `flow.codec.VideoCodec.load`.
        progress: called with (stage, done, total); total is None while unknown.

    Raises:
        ShardError: a shard is missing or given twice.
        LedgerError: another run holds the output, or it was prepared with other settings.
        CodecError: the codec cannot be loaded.
        ResourceError: the cluster's free CPUs cannot hold the stages.
    """
    begun = time.monotonic()
    with Ledger(Path(out).absolute()).lock():
        plan = plan_run(config, shards, Path(out), str(codec))
        samples, startup_s = 0, 0.0
        if plan.jobs:
            samples, first_s = _run(plan, config, progress)
            startup_s = max(0.0, first_s - begun)
        return report_of(
            plan, samples_now=samples, seconds=time.monotonic() - begun, startup_s=startup_s
        )


def _run(plan: RunPlan, config: PrepareConfig, progress: Progress | None) -> tuple[int, float]:
    """Stream every job through the pipeline; (samples finished, time of the first one)."""
    free = ray.available_resources()
    cpus, gpus = float(free.get("CPU", 0.0)), float(free.get("GPU", 0.0))
    resources = plan_resources(
        cpus, gpus, config.concurrency, encoder_threads=config.encoder_threads
    )
    log.info("preparing %d shards on %s", len(plan.jobs), describe(resources, cpus))
    say: Progress = progress or (lambda stage, done, total: None)
    samples, committed, first_s = 0, 0, 0.0
    before = len(plan.names) - len(plan.jobs)
    say("shards", before, len(plan.names))
    with _quiet_ray_data():
        pipeline = build_pipeline(plan, config, resources)
        for batch in _done_rows(pipeline):
            for number, is_committed in batch:
                first_s = first_s or time.monotonic()
                samples += number >= 0
                committed += is_committed
                if number >= 0:
                    say("samples", samples, None)
                if is_committed:
                    say("shards", before + committed, len(plan.names))
    return samples, first_s or time.monotonic()


def _done_rows(pipeline: Dataset) -> Iterable[list[tuple[int, bool]]]:
    for table in pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield list(zip(table["number"].to_pylist(), table["committed"].to_pylist(), strict=True))


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data's own bars and notices off while we run; the caller draws from `progress`."""
    context = DataContext.get_current()
    names = ("enable_progress_bars", "print_on_execution_start")
    before = {name: getattr(context, name) for name in names}
    # The second says only that the bars are off.
    quiet = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in quiet}
    for name in names:
        setattr(context, name, False)
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
