"""Data preparation on Ray Data: only the wiring. What happens to a sample is in `data_prep.stages`.

    ShardSource (one read task per tar) → Decode → Filter → Caption → Encode → Sink

Each stage is a Ray Data operator of its own: actor pools never fuse with one another, and the read
task's CPU share differs from the decoder's. Pools grow and shrink between their bounds. All of it
streams; shards in flight are bounded by the number of read tasks. The caller starts Ray. Does not
know what makes a sample good or bad.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from data_prep.captions.captioner import CaptionerUnavailable, captioner_name
from data_prep.captions.vllm import (
    engine_result,
    engine_row,
    vllm_gpus,
    vllm_settings,
)
from data_prep.config import ConcurrencyConfig, PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.ledger.ledger import Ledger, LedgerError
from data_prep.ledger.recaption import numbers_to_skip
from data_prep.ledger.reuse import Reuse
from data_prep.resources import ResourceError, StageResources, describe, plan_resources
from data_prep.row import split_windows
from data_prep.run import (
    PrepareReport,
    RunPlan,
    StageFigures,
    finish_run,
    located,
    plan_caption_run,
    plan_run,
    report_of,
)
from data_prep.sources.samples import ShardError
from data_prep.stages import (
    PAYLOAD,
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
    with_caption,
)
from data_prep.storage.location import (
    Location,
    StorageError,
    absolute,
)

log = logging.getLogger("flowreel.prepare")

Progress = Callable[[str, int, int | None], None]
"""progress(stage, done, total): stage is "samples" (total None: not known before the end of the
shards) or "shards"."""

_ROW_NAMES = tuple(ROW_SCHEMA.names)
_FREED_S = 30.0
"""How long a killed run may take to give its CPUs back, in seconds."""
_DONE_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("number", pa.int32()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("reused", pa.bool_()),
        pa.field("committed", pa.bool_()),
    ]
)


class ShardSource(Datasource):
    """Ray Data source of tars and folders: one read task per shard that is not done.

    Unlike `ray.data.read_webdataset` it salvages truncated tars and can resume: finished shards
    never become a task, staged samples are not emitted again.
    """

    def __init__(self, jobs: Sequence[ShardJob], config: PrepareConfig, out: Location) -> None:
        super().__init__()
        self._jobs = list(jobs)
        self._config = config
        self._ledger = Ledger(out)

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before the shards are read."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task per shard, whatever parallelism Ray asks for: a tar is read front to back.

        What is staged is looked up here, once: a task that Ray repeats must give the same blocks
        again, of which Ray drops as many as it had.
        """
        started = set(self._ledger.folder.folders("staging"))
        return [
            ReadTask(
                partial(
                    _read_blocks,
                    job,
                    self._config,
                    numbers_to_skip(self._ledger, job)
                    if job.name in started or not job.encode
                    else set(),
                ),
                BlockMetadata(
                    num_rows=None, size_bytes=None, input_files=[job.source], exec_stats=None
                ),
                schema=ROW_SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for job in self._jobs
        ]


def _read_blocks(job: ShardJob, config: PrepareConfig, skip: set[int]) -> Iterator[Block]:
    """Small blocks, so that the first sample is decoded while the last is still being read."""
    rows: list[Row] = []
    size_bytes = 0
    for row in read_rows(job, config, skip):
        rows.append(row)
        size_bytes += len(row["media"] or b"")
        if size_bytes >= config.concurrency.block_bytes:
            yield _table(rows)
            rows, size_bytes = [], 0
    if rows:
        yield _table(rows)


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=ROW_SCHEMA)


class _Operator:
    """A stage as Ray Data wants it: a block of rows in, the same rows out in one block.

    One table a row would cost Ray Data a millisecond each to put together again, and frames that a stage only reads are not copied.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        rows = _rows(batch)
        done = [run_stage(self._stage, row) for row in rows]
        columns = {}
        for field in ROW_SCHEMA:
            values = [row[field.name] for row in done]
            same = field.name in PAYLOAD and all(
                new is old[field.name] for new, old in zip(values, rows, strict=True)
            )
            columns[field.name] = batch[field.name] if same else pa.array(values, field.type)
        yield pa.table(columns, schema=ROW_SCHEMA)


def _rows(batch: pa.Table) -> list[Row]:
    """The rows of a block; frames and moments are views of the block's own memory."""
    views = [name for name in PAYLOAD if name != "media"]
    rows: list[Row] = batch.drop_columns(views).to_pylist()
    for name in views:
        for row, value in zip(rows, batch[name], strict=True):
            row[name] = memoryview(value.as_buffer()) if value.is_valid else None
    return rows


class Decode(_Operator):
    """`DecodeStage` as an actor."""

    def __init__(self, config: PrepareConfig, reuse: Reuse) -> None:
        super().__init__(DecodeStage(config, reuse=reuse))


class Filter(_Operator):
    """`FilterStage` as an actor."""

    def __init__(self, config: PrepareConfig, reuse: Reuse) -> None:
        super().__init__(FilterStage(config, reuse))


class Caption:
    """`CaptionStage` as an actor, a batch at a time, on the GPU where Ray gave it one."""

    def __init__(self, config: PrepareConfig) -> None:
        self._stage: CaptionStage | CaptionerUnavailable
        try:
            self._stage = CaptionStage(config, "cuda" if ray.get_gpu_ids() else "cpu")
        except CaptionerUnavailable as error:
            # Of what a constructor raises Ray keeps only a traceback's text.
            self._stage = error

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if isinstance(self._stage, CaptionerUnavailable):
            raise self._stage
        yield _table(list(self._stage.process_all(batch.to_pylist())))


class Encode(_Operator):
    """`EncodeStage` as an actor, on the GPU where Ray gave it one."""

    def __init__(self, config: PrepareConfig, codec: str, skip: frozenset[str]) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        super().__init__(EncodeStage(config, codec, skip, device))


class Sink:
    """`SinkStage` as the run's only writer; says what it took.

    It holds the right to write itself: where its run was killed, it may live on for a moment.
    """

    def __init__(self, config: PrepareConfig, out: str, jobs: tuple[ShardJob, ...]) -> None:
        self._held = contextlib.ExitStack()
        self._stage = SinkStage(config, out, jobs)
        self._held.enter_context(self._stage.ledger.writing())

    def __del__(self) -> None:
        # Ray deletes an operator that ends in peace; a killed one's lock ends with its process.
        self._held.close()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        taken = []
        for row in batch.to_pylist():
            done = {name: row[name] for name in ("shard", "number", "status", "reason")}
            done["reused"] = any(part["reused"] for part in split_windows(row))
            done["committed"] = self._stage.accept(row)
            taken.append(done)
        yield pa.Table.from_pylist(taken, schema=_DONE_SCHEMA)


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
    reuse = Reuse(plan.out, plan.jobs)
    stages: list[tuple[str, type, tuple[Any, ...]]] = [
        ("decode", Decode, (config, reuse)),
        ("filter", Filter, (config, reuse)),
        ("caption", Caption, (config,)),
        ("encode", Encode, (config, plan.codec, skip)),
        ("sink", Sink, (config, plan.out, plan.jobs)),
    ]
    captioner = config.captioner
    calls = captioner.batch_size if captioner.backend == "vlm" else captioner.requests_in_flight
    sizes = {} if captioner.backend == "measured" else {"caption": calls}
    for name, operator, arguments in stages:
        if name not in resources:
            continue
        if name == "caption" and captioner.backend == "vllm":
            rows = caption_with_vllm(rows, config, engines=resources[name].workers)
            continue
        need = resources[name]
        rows = rows.map_batches(
            operator,
            fn_constructor_args=arguments,
            compute=ActorPoolStrategy(min_size=need.workers, max_size=max(need.workers, need.most)),
            num_cpus=need.cpus,
            num_gpus=need.gpus or None,
            batch_size=sizes.get(name, 1 if need.gpus else None),
            batch_format="pyarrow",
        )
    return rows


def caption_with_vllm(rows: Dataset, config: PrepareConfig, *, engines: int) -> Dataset:
    """The rows captioned by `engines` vLLM engines, a GPU stage of `ray.data.llm`."""
    processor = vllm_processor(config, engines=engines)
    name = captioner_name(config.captioner)
    return processor(rows).map_batches(
        partial(_captioned, name=name), batch_format="pyarrow", batch_size=None, num_cpus=0.1
    )


def vllm_processor(config: PrepareConfig, *, engines: int) -> Any:
    """Ray's processor for the captioner's settings; needs the model's processor, not vLLM."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from data_prep.captions.vlm import load_processor, render_prompt

    captioner = config.captioner
    settings = vllm_settings(captioner, engines=engines, seed=config.seed)
    tokens = load_processor(captioner)
    prompts = {n: render_prompt(tokens, captioner, n) for n in range(1, captioner.frames + 1)}
    share = {"num_cpus": 0.1}
    return build_processor(
        vLLMEngineProcessorConfig(**settings),
        preprocess=lambda row: engine_row(row, captioner, prompts, config.seed),
        postprocess=lambda row: {name: row.get(name) for name in (*_ROW_NAMES, "generated_text")},
        preprocess_map_kwargs=share,
        postprocess_map_kwargs=share,
    )


def _captioned(batch: pa.Table, *, name: str) -> Iterator[pa.Table]:
    """Rows as the engine leaves them → rows of ROW_SCHEMA with captions."""
    for row in batch.to_pylist():
        captioned, written = engine_result(row)
        row = {column: row.get(column) for column in _ROW_NAMES}
        yield _table([with_caption(row, written, name) if captioned else row])


def prepare(
    config: PrepareConfig,
    shards: Sequence[str] | None,
    out: Location,
    codec: Path | str,
    *,
    only: Literal["captions"] | None = None,
    redo: bool = False,
    progress: Progress | None = None,
) -> PrepareReport:
    """Video shards → latent shards. Ray must be running where anything is left to do.

    May be killed at any moment and run again: the output is the same, byte for byte, and finished
    work is not done twice. With nothing left it returns at once and does not touch Ray.

    Args:
        config: the settings.
        shards: WebDataset tars (local paths or URIs that pyarrow opens) and folders of loose files. With
            `only` None means those that the output was prepared from, where they were.
        out: output folder, path or URI, read by `data_prep.latents.dataset.LatentDataset`.
        codec: folder or hub id for `flow.codec.VideoCodec.load`.
        redo: make the shards of an output that other settings made anew, instead of refusing; of their samples only what
            the change affects (`data_prep.ledger.reuse`).
        only: "captions" writes captions for the latents that stand, where they are missing or of
            another captioner; latent files are not touched.
        progress: called with (stage, done, total); total is None while unknown.

    Raises:
        ShardError: a shard is missing or given twice.
        LedgerError: another run holds the output, or it was prepared with other settings.
        CodecError: the codec cannot be loaded.
        CaptionerUnavailable: the captioner cannot work; what is done stays, run again to go on.
        ResourceError: the cluster's free CPUs cannot hold the stages.
        StorageError: the disk or the store failed; run the same command again when it is well.
    """
    begun = time.monotonic()
    config = located(config)
    with Ledger(absolute(out)).lock():
        if only == "captions":
            plan = plan_caption_run(config, shards, out)
        else:
            plan = plan_run(config, shards or (), out, str(codec), redo=redo)
        done = _run(plan, config, progress) if plan.jobs else _Done()
        finish_run(plan, config)
        return report_of(
            plan,
            samples_now=done.samples,
            reused_now=done.reused,
            seconds=time.monotonic() - begun,
            startup_s=max(0.0, done.first_s - begun) if plan.jobs else 0.0,
            stages=done.stages,
            resources=done.resources,
        )


@dataclass
class _Done:
    """What came out of the pipeline. `first_s`: when the first sample did; `resources`: what the preflight chose."""

    samples: int = 0
    reused: int = 0
    first_s: float = 0.0
    resources: str = ""
    stages: tuple[StageFigures, ...] = ()


def _run(plan: RunPlan, config: PrepareConfig, progress: Progress | None) -> _Done:
    """Stream every job through the pipeline."""
    if config.captioner.backend == "vllm" and find_spec("vllm") is None:
        raise CaptionerUnavailable("vLLM is not installed; pip install 'flowreel[vllm]'")
    encodes = any(job.encode for job in plan.jobs)
    cpus, resources = _resources(config, _captioning(config, encodes=encodes))
    if not encodes:
        del resources["encode"]
    read = resources["read"]
    resources["read"] = read._replace(workers=min(read.workers, len(plan.jobs)))
    done = _Done(resources=describe(resources, cpus))
    log.info("preparing %d shards on %s", len(plan.jobs), done.resources)
    say: Progress = progress or (lambda stage, done, total: None)
    shards = len(plan.names) - len(plan.jobs)
    say("shards", shards, len(plan.names))
    with _our_ray_data(config), _plain_errors():
        pipeline = build_pipeline(plan, config, resources)
        for row in _done_rows(pipeline):
            done.first_s = done.first_s or time.monotonic()
            if row["number"] >= 0:
                done.samples += 1
                done.reused += row["reused"]
                say("samples", done.samples, None)
            if row["committed"]:
                shards += 1
                say("shards", shards, len(plan.names))
        done.stages = tuple(_figures(pipeline, resources))
    done.first_s = done.first_s or time.monotonic()
    return done


def _figures(pipeline: Dataset, resources: dict[str, StageResources]) -> Iterator[StageFigures]:
    """What Ray Data measured of each operator; the stages and its operators are in the same order."""
    summaries, operators = [pipeline.get_stats_summary()], list[Any]()
    while summaries:
        summary = summaries.pop()
        summaries += summary.parents
        operators = [*summary.operators_stats, *operators]
    if len(operators) != len(resources):
        return  # an engine of ray.data.llm brings operators of its own
    for (name, need), operator in zip(resources.items(), operators, strict=True):
        if operator.wall_time is None:
            return
        yield StageFigures(
            name=name,
            workers=need.workers,
            busy_s=operator.wall_time.sum,
            span_s=operator.latest_end_time - operator.earliest_start_time,
            rows=int(operator.output_num_rows.sum),
            bytes_out=int(operator.output_size_bytes.sum),
        )


def _captioning(config: PrepareConfig, *, encodes: bool) -> ConcurrencyConfig:
    """What is asked of the cluster, given the captioner and whether anything is encoded."""
    wanted = config.concurrency
    if config.captioner.backend == "vllm":
        wanted = wanted.model_copy(update={"captioner_gpus": float(vllm_gpus(config.captioner))})
    if not encodes:
        wanted = wanted.model_copy(update={"encoders": 1, "encoder_gpus": 0.0})
    return wanted


def _resources(
    config: PrepareConfig, wanted: ConcurrencyConfig
) -> tuple[float, dict[str, StageResources]]:
    """Free CPUs, and the stages on them; what a run killed just now still holds is waited for."""
    deadline = time.monotonic() + _FREED_S
    while True:
        free = ray.available_resources()
        cpus, gpus = float(free.get("CPU", 0.0)), float(free.get("GPU", 0.0))
        total = float(ray.cluster_resources().get("CPU", 0.0))
        late = time.monotonic() >= deadline
        try:
            plan = plan_resources(cpus, gpus, wanted, encoder_threads=config.encoder_threads)
        except ResourceError:
            if late:
                raise
        else:
            # On a share of a busy cluster one can work, but not on crumbs of an idle one.
            if late or cpus >= min(total, 1.0):
                return cpus, plan
        time.sleep(0.5)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """An error of ours that stops a run as it was raised, instead of Ray's wrapping of it."""
    ours = (CaptionerUnavailable, StorageError, LedgerError, ShardError)
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and type(found) not in ours and not isinstance(found, LedgerError):
            found = getattr(found, "cause", None) or found.__cause__
        if found is None:
            raise
        # Ray adds advice on its retries below our own line.
        found.args = (str(found).partition("\n")[0],)
        raise found from None


def _done_rows(pipeline: Dataset) -> Iterator[Row]:
    for table in pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


@contextlib.contextmanager
def _our_ray_data(config: PrepareConfig) -> Iterator[None]:
    """Blocks of our size, and Ray Data's own bars and notices off while we run; the caller draws from `progress`."""
    context = DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "target_max_block_size": config.concurrency.block_bytes,
        # A thread for every task that asks the kernel for its memory.
        "memory_usage_poll_interval_s": None,
        # Only warns that a codec is larger than its actor's share of memory.
        "issue_detectors_config": replace(context.issue_detectors_config, detectors=[]),
    }
    before = {name: getattr(context, name) for name in settings}
    # The second says only that the bars are off.
    quiet = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in quiet}
    for name, value in settings.items():
        setattr(context, name, value)
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            # Of few shards, that they are fewer than the actors of a stage.
            few = "The (minimum|maximum) number of concurrent"
            warnings.filterwarnings("ignore", message=few, category=UserWarning)
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
