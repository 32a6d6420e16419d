"""Data preparation on Ray Data: only the wiring. What happens to a sample is in `data_prep.stages`.

    ShardSource (one read task per shard) → Decode → Caption → Encode → Sink

Each is a Ray Data operator of its own: actor pools never fuse with one another, and the read task's
share of a CPU differs from the decoder's. Filters run in the actor that decodes, where the frames
are. The last operator hands rows to the sinks, actors beside Ray Data (`data_prep.ledger.on_ray`).
Pools grow and shrink between their bounds. All of it streams, and the number of read tasks bounds
the shards in flight. The caller starts Ray. Knows
nothing of what makes a sample good or bad.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import RayTaskError

from data_prep.captions.captioner import CaptionerUnavailable
from data_prep.captions.on_ray import caption_with_vllm
from data_prep.captions.stage import CaptionStage
from data_prep.captions.vllm import vllm_gpus
from data_prep.clips.decode import DecodeStage
from data_prep.config import PrepareConfig
from data_prep.latents.encode import EncodeStage
from data_prep.latents.records import INFO_NAME
from data_prep.ledger.locks import lock_output
from data_prep.ledger.on_ray import Sink, blocks_in_flight, running_sinks
from data_prep.ledger.reuse import Reuse
from data_prep.liveness import Endpoint, RayEnded, ended_with
from data_prep.operators import busy_so_far, stage_figures
from data_prep.preflight.on_ray import check_shared, plan_on_cluster
from data_prep.progress import RunProgress, Tally
from data_prep.resources import StageResources, describe, needed_concurrency
from data_prep.row import PAYLOAD, ROW_SCHEMA, Row, rows_of, table_of
from data_prep.run import (
    PrepareReport,
    RunFigures,
    RunPlan,
    finish_run,
    located,
    plan_caption_run,
    plan_run,
    report_of,
)
from data_prep.sources.on_ray import ShardSource
from data_prep.stages import FilterStage, Stage, StageChain, run_stage
from data_prep.storage.location import Location, absolute
from data_prep.storage.store import open_folder
from flowreel.errors import FlowreelError

log = logging.getLogger("flowreel.prepare")

_SOURCES_LOOKED_AT = 16
"""Of so many local shards it is asked whether all machines see them."""
_NODE_PATIENCE_S = 3.0
"""How long Ray's own node may be away, in seconds: it never comes back."""


class _Operator:
    """A stage as Ray Data wants it: a block of rows in, the same rows out in one block.

    Args:
        make_stage: called in the actor.
    """

    _stage: Stage | None = None
    _error: FlowreelError | None = None

    def __init__(self, make_stage: Callable[[], Stage]) -> None:
        try:
            self._stage = make_stage()
        except FlowreelError as error:
            # Of an error in a constructor Ray keeps only the text of its traceback, so this one is
            # raised at the first block.
            self._error = error

    def __del__(self) -> None:
        # Ray deletes an operator that ends in peace; what a killed one held ends with its process.
        if self._stage is not None:
            self._stage.close()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if self._error is not None:
            raise self._error
        assert self._stage is not None
        yield _through(self._stage, batch)


def _through(stage: Stage, batch: pa.Table) -> pa.Table:
    """A block after a stage.

    All rows go into one table, because Ray Data takes a millisecond to put each table together
    again; and frames that a stage only reads are not copied.
    """
    before = rows_of(batch)
    after = [run_stage(stage, row) for row in before]
    columns = {}
    for field in ROW_SCHEMA:
        values = [row[field.name] for row in after]
        is_untouched = field.name in PAYLOAD and all(
            new is old[field.name] for new, old in zip(values, before, strict=True)
        )
        columns[field.name] = batch[field.name] if is_untouched else pa.array(values, field.type)
    return pa.table(columns, schema=ROW_SCHEMA)


class Decode(_Operator):
    """`DecodeStage` and `FilterStage` as one actor: what a filter drops never leaves it."""

    def __init__(
        self, config: PrepareConfig, sizes: Sequence[tuple[int, int]], reuse: Reuse
    ) -> None:
        super().__init__(
            lambda: StageChain(DecodeStage(config, sizes, reuse=reuse), FilterStage(config, reuse))
        )


class Caption(_Operator):
    """`CaptionStage` as an actor, a batch at a time, on the GPU if Ray gave it one."""

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__(lambda: CaptionStage(config, _device()))

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if self._error is not None:
            raise self._error
        assert isinstance(self._stage, CaptionStage)
        yield table_of(self._stage.process_all(batch.to_pylist()))


class Encode(_Operator):
    """`EncodeStage` as an actor, on the GPU if Ray gave it one."""

    def __init__(self, config: PrepareConfig, codec: str, skip: frozenset[str]) -> None:
        super().__init__(lambda: EncodeStage(config, codec, skip, _device()))


def _device() -> str:
    return "cuda" if ray.get_gpu_ids() else "cpu"


def build_pipeline(
    plan: RunPlan,
    config: PrepareConfig,
    resources: dict[str, StageResources],
    sinks: Sequence[Any],
) -> Dataset:
    """The dataset of five operators; nothing runs before it is iterated.

    Args:
        plan: what is to be done.
        config: the settings.
        resources: workers of each stage.
        sinks: see `data_prep.ledger.on_ray.running_sinks`.
    """
    read = resources["read"]
    rows = ray.data.read_datasource(
        ShardSource(plan.jobs, config, plan.out),
        num_cpus=read.cpus,
        compute=TaskPoolStrategy(size=max(read.workers, read.most)),
        override_num_blocks=len(plan.jobs),
    )
    skip = frozenset(job.name for job in plan.jobs if not job.encode)
    reuse = Reuse(plan.out, plan.jobs)
    stages: list[tuple[str, type, tuple[Any, ...]]] = [
        ("decode", Decode, (config, plan.sizes, reuse)),
        ("caption", Caption, (config,)),
        ("encode", Encode, (config, plan.codec, skip)),
        ("sink", Sink, (sinks,)),
    ]
    captioner = config.captioner
    calls = captioner.batch_size if captioner.backend == "vlm" else captioner.requests_in_flight
    batch_sizes = {"caption": calls} if captioner.needs_model else {}
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
            compute=_pool(need, blocks_in_flight(plan.out) if name == "sink" else 1),
            num_cpus=need.cpus,
            num_gpus=need.gpus or None,
            batch_size=batch_sizes.get(name, 1 if need.gpus else None),
            batch_format="pyarrow",
        )
    return rows


def _pool(need: StageResources, calls: int) -> ActorPoolStrategy:
    """The actors of a stage, each of which is called by so many threads."""
    threads: dict[str, Any] = {}
    if calls > 1:
        threads = {"enable_true_multi_threading": True, "max_concurrent_calls_per_actor": calls}
    most = max(need.workers, need.most)
    return ActorPoolStrategy(min_size=need.workers, max_size=most, **threads)


def prepare(
    config: PrepareConfig,
    shards: Sequence[str] | None,
    out: Location,
    codec: Path | str,
    *,
    only: Literal["captions"] | None = None,
    redo: bool = False,
    progress: RunProgress | None = None,
) -> PrepareReport:
    """Video shards → latent shards. Ray must be running if anything is left to do.

    May be killed at any moment and run again: the output is the same, byte for byte, and finished
    work is not done twice. With nothing left it returns at once and does not touch Ray.

    Args:
        config: the settings.
        shards: WebDataset tars (local paths, or URIs of a store or the web) and folders of loose
            files. With `only`, None means those that the output was prepared from, where they were.
        out: output folder, path or URI; `data_prep.latents.dataset.LatentDataset` reads it.
        codec: folder or hub id for `flow.codec.VideoCodec.load`.
        only: "captions" writes captions for the latents that stand, if they are missing or of
            another captioner; latent files are not touched.
        redo: make anew the shards of an output that other settings made, instead of refusing; of
            their samples only what the change affects (`data_prep.ledger.reuse`).
        progress: called as samples and shards are finished.

    Raises:
        ShardError: a shard is missing or given twice.
        LedgerError: another run holds the output, or it was prepared with other settings.
        SizeError: the codec does not take clips of the bucket's size or length.
        CodecError: the codec cannot be loaded.
        CaptionerUnavailable: the captioner cannot work; what is done stays, run again to go on.
        NotShared: a local output or shard is not seen by every machine of the cluster.
        ResourceError: the cluster's free CPUs cannot hold the stages.
        StorageError: the disk or the store failed; run the same command again when it is well.
    """
    begun_s = time.monotonic()
    config = located(config)
    with lock_output(open_folder(absolute(out))):
        if only == "captions":
            plan = plan_caption_run(config, shards, out)
        else:
            plan = plan_run(config, shards or (), out, str(codec), redo=redo)
        figures = _run(plan, config, progress, begun_s) if plan.jobs else RunFigures()
        finish_run(plan, config)
        figures.seconds = time.monotonic() - begun_s
        return report_of(plan, figures)


def _run(
    plan: RunPlan, config: PrepareConfig, progress: RunProgress | None, begun_s: float
) -> RunFigures:
    """Stream every job through the pipeline."""
    is_vllm = config.captioner.backend == "vllm"
    if is_vllm and find_spec("vllm") is None:
        raise CaptionerUnavailable("vLLM is not installed; pip install 'flowreel[vllm]'")
    check_shared([f"{plan.out}/{INFO_NAME}"], "--out")
    check_shared([job.source for job in plan.jobs[:_SOURCES_LOOKED_AT]], "--shards")
    encodes = any(job.encode for job in plan.jobs)
    gpus = vllm_gpus(config.captioner) if is_vllm else None
    concurrency = needed_concurrency(config.concurrency, vllm_gpus=gpus, encodes=encodes)
    cpus, resources = plan_on_cluster(concurrency, config.encoder_threads)
    if not encodes:
        del resources["encode"]
    read = resources["read"]
    readers = _most(read, plan)
    workers = min(read.workers, readers)
    resources["read"] = read._replace(workers=workers, most=readers if readers > workers else 0)
    figures = RunFigures(resources=describe(resources, cpus))
    log.info("preparing %d shards on %s", len(plan.jobs), figures.resources)
    say: RunProgress = progress or (lambda state: None)
    tally = Tally(len(plan.names) - len(plan.jobs), len(plan.names))
    say(tally.state({}))
    with (
        _our_ray_data(config),
        _plain_errors(),
        _what_is_kept(tally),
        ended_with(_endpoints()),
        running_sinks(config, plan.out, plan.jobs, _most(resources["sink"], plan)) as sinks,
    ):
        pipeline = build_pipeline(plan, config, resources, sinks)
        for receipt in _receipts(pipeline):
            figures.startup_s = figures.startup_s or time.monotonic() - begun_s
            tally.take(receipt)
            say(tally.state(busy_so_far(pipeline, resources)))
        figures.stages = tuple(stage_figures(pipeline, resources))
    figures.samples, figures.reused = tally.samples, tally.reused
    figures.startup_s = figures.startup_s or time.monotonic() - begun_s
    return figures


def _most(need: StageResources, plan: RunPlan) -> int:
    """As many workers as a stage may come to have, of which each has a shard to itself."""
    return min(max(need.workers, need.most), len(plan.jobs))


def _endpoints() -> list[Endpoint]:
    """The processes of Ray without which a driver cannot go on."""
    head_host, _, head_port = ray.get_runtime_context().gcs_address.rpartition(":")
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    # Ray ends this process so long after it lost the head, which may come back until then.
    limit_s = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112
    return [
        Endpoint("its head process (GCS)", head_host, int(head_port), patience_s=limit_s * 2 / 3),
        Endpoint(
            "the process of this node (raylet)",
            node["NodeManagerAddress"],
            node["NodeManagerPort"],
            patience_s=_NODE_PATIENCE_S,
        ),
    ]


def _receipts(pipeline: Dataset) -> Iterator[Row]:
    for table in pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


@contextlib.contextmanager
def _what_is_kept(tally: Tally) -> Iterator[None]:
    """Where Ray ends, the error says what is kept and how to go on."""
    try:
        yield
    except RayEnded as error:
        raise RayEnded(
            f"{error}. {tally.shards} of {tally.of_shards} shards are finished and kept, and so is "
            "every finished sample of the others; run the same command again to go on"
        ) from error


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """An error of ours that stops a run comes out as it was raised, not as Ray wraps it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        # Ray's wrapper is made an instance of the error's own class too.
        while cause is not None and (
            isinstance(cause, RayTaskError) or not isinstance(cause, FlowreelError)
        ):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        # Our messages are one line; below it Ray adds advice on its own retries.
        raise type(cause)(str(cause).partition("\n")[0]) from None


@contextlib.contextmanager
def _our_ray_data(config: PrepareConfig) -> Iterator[None]:
    """Blocks of our size, and Ray Data's own bars and notices off while we run.

    The caller draws from `progress`.
    """
    context = DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "target_max_block_size": config.concurrency.block_bytes,
        # It would start a thread for every task, to ask the kernel for the task's memory.
        "memory_usage_poll_interval_s": None,
        # The only one that fires warns that a codec is larger than its actor's share of memory.
        "issue_detectors_config": replace(context.issue_detectors_config, detectors=[]),
    }
    before = {name: getattr(context, name) for name in settings}
    # The second logger only says that the bars are off.
    quiet = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in quiet}
    for name, value in settings.items():
        setattr(context, name, value)
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            # Ray warns of a run of few shards that they are fewer than the actors of a stage.
            few = "The (minimum|maximum) number of concurrent"
            warnings.filterwarnings("ignore", message=few, category=UserWarning)
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
