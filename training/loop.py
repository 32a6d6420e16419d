"""The training loop of one worker: batches in, checkpoints and history out.

Starts from the newest complete checkpoint in `out/checkpoints` and goes on as if it had never
stopped. Takes `report` as a callable and knows nothing of Ray; knows MLflow only as an object that
takes records.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.latents.dataset import LatentDataset
from flow.config import FlowConfig
from flow.flow import FlowModel
from flow.likelihood import noise_floor
from flow.text import TextSpec, build_text_encoder
from training.batch_sampler import Sampler, StepPlan
from training.batches import (
    BatchMaker,
    LatentStore,
    Prompts,
)
from training.checkpoint import (
    Checkpoint,
    check_fits,
    digest_of,
    latest_complete,
    load_checkpoint,
    save_checkpoint,
)
from training.config import TrainConfig
from training.held_out import HeldOut
from training.history import HISTORY_NAME, History
from training.metrics import step_cost
from training.parallel import Parallel, join_workers, shard_model
from training.step import StepMetrics, TrainStep
from training.tracking import MetricsLogger, TrackingRun

CHECKPOINTS_NAME = "checkpoints"
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainJob:
    """What is trained on what, and where to.

    Attributes:
        flow, text: the model and the text encoder it reads.
        dataset: folder of prepared latents.
        out: the run's folder; all workers must see the same one.
    """

    flow: FlowConfig
    text: TextSpec
    dataset: str | Path
    out: Path

    @property
    def checkpoints(self) -> Path:
        return self.out / CHECKPOINTS_NAME

    @property
    def history(self) -> Path:
        return self.out / HISTORY_NAME


@dataclass(frozen=True)
class LoopResult:
    """Where a loop ended.

    Attributes:
        checkpoint: the last checkpoint.
        steps: steps taken in the whole run.
        resumed_from: step of the checkpoint it started from; None for a fresh run.
    """

    checkpoint: Checkpoint
    steps: int
    resumed_from: int | None


def ids_digest(dataset: LatentDataset) -> str:
    """Digest of which samples a split has: batches are drawn from these."""
    digest = hashlib.sha256()
    for bucket, ids in sorted(dataset.buckets.items()):
        digest.update(f"{tuple(bucket)}\n".encode())
        digest.update("\n".join(ids).encode())
    return digest.hexdigest()[:16]


def describe(config: TrainConfig, job: TrainJob, dataset: LatentDataset) -> dict[str, Any]:
    """All that decides which weights come out, as plain values; a checkpoint must have the same to
    be resumed.
    """
    return {
        "flow": job.flow.to_dict(),
        "text": job.text.to_dict(),
        "train": config.trajectory(),
        "dataset": {
            "codec_digest": dataset.info.codec_digest,
            "convention": dataset.info.convention.to_dict(),
            "samples": ids_digest(dataset),
        },
    }


def make_sampler(config: TrainConfig, dataset: LatentDataset) -> Sampler:
    """The sampler of a configuration over a dataset's training split."""
    from_clips = {"auto": None, "records": False, "first_frames": True}[config.image_source]
    return Sampler(
        dataset.buckets,
        seed=config.seed,
        batch_size=config.batch_size,
        image_batch_size=config.image_batch_size,
        image_ratio=config.image_ratio,
        drop_first_frame=config.drop_first_frame,
        image_from_clips=from_clips,
    )


def fresh_model(flow: FlowConfig, seed: int) -> FlowModel:
    """Start weights from the seed, alike on all workers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlowModel(flow)


class _Recorder:
    """Gathers a worker's step metrics and writes them out (worker 0) at reports."""

    def __init__(
        self,
        config: TrainConfig,
        job: TrainJob,
        step: TrainStep,
        start: int,
        run: TrackingRun | None,
    ) -> None:
        self.config, self.job, self.step = config, job, step
        first = step.parallel.is_first
        self.history = History(job.history, start) if first else None
        self.logger = MetricsLogger(run if first else None)
        self.last: dict[str, Any] = {}
        self._pending: list[tuple[StepMetrics, dict[str, Any]]] = []

    def add(self, metrics: StepMetrics, extra: dict[str, Any]) -> None:
        self._pending.append((metrics, extra))

    def annotate(self, extra: dict[str, Any]) -> None:
        """Add values to the step just taken."""
        self._pending[-1][1].update(extra)

    def flush(self, *, durable: bool = False) -> None:
        """Write what was gathered. Every worker reads its metrics here, and so stops with the
        others.
        """
        records = []
        floor = noise_floor(self.job.flow.noise_std)
        for metrics, extra in self._pending:
            records.append({**metrics.record(), "noise_floor": floor, **extra})
        self._pending.clear()
        if records:
            self.last = records[-1]
        if self.history is not None:
            self.history.append(records, durable=durable)
            self.logger.log(records)
        for record in records:
            self.step.check_skips(record)


def _costs(
    config: TrainConfig,
    job: TrainJob,
    step: TrainStep,
    plan: StepPlan,
    shape: torch.Size,
    seconds: float,
) -> dict[str, float]:
    """Speed of a step: tokens per second, and MFU where the peak is known."""
    frames = shape[1] if len(shape) == 5 else 1
    cost = step_cost(
        step.model,
        job.flow,
        batch=len(plan.ids),
        frames=frames,
        height=shape[-2],
        width=shape[-1],
        with_denoiser=step.trains_denoiser(plan.step),
    )
    out = {
        "tokens_per_s": cost.tokens / seconds,
        "flops_per_s": (cost.matmul_flops + cost.attention_flops) / seconds,
    }
    if config.peak_flops_per_device is not None:
        out.update(cost.utilisation(seconds, config.peak_flops_per_device * step.parallel.world))
    return out


def train(
    config: TrainConfig,
    job: TrainJob,
    *,
    report: Report = lambda record: None,
    tracking: TrackingRun | None = None,
) -> LoopResult:
    """Train as one of `config.workers` workers until `config.steps` steps are taken.

    Args:
        report: called on every worker alike with the last step's record after each checkpoint (it
            may be a barrier).
        tracking: where worker 0 sends its metrics.

    Raises:
        CheckpointMismatch: `out` holds checkpoints of another run.
        SkippedTooOften: the run makes no progress.
        SamplerError, LatentDatasetError: the data do not fit the configuration.
    """
    with join_workers(config) as parallel:
        dataset = LatentDataset(job.dataset, split="train")
        description = describe(config, job, dataset)
        model = fresh_model(job.flow, config.seed)
        shard_model(model, parallel, config)
        step = TrainStep(model, job.flow, config, parallel)
        resumed = _resume(job, step, description, parallel)
        start = resumed.step if resumed else 0
        recorder = _Recorder(config, job, step, start, tracking)
        try:
            checkpoint = _run(config, job, step, dataset, description, recorder, start, report)
        finally:
            recorder.logger.close()
        return LoopResult(
            checkpoint or resumed or _must_be_one(job),
            max(start, config.steps),
            resumed.step if resumed else None,
        )


def _must_be_one(job: TrainJob) -> Checkpoint:
    found = latest_complete(job.checkpoints)
    assert found is not None, "a finished loop leaves a checkpoint"
    return found


def _resume(
    job: TrainJob, step: TrainStep, description: dict[str, Any], parallel: Parallel
) -> Checkpoint | None:
    if parallel.is_first:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
    parallel.barrier()
    latest = latest_complete(job.checkpoints)
    if latest is None:
        return None
    check_fits(latest, description)
    load_checkpoint(latest, step.state(), parallel)
    step.after_load()
    return latest


def _run(
    config: TrainConfig,
    job: TrainJob,
    step: TrainStep,
    dataset: LatentDataset,
    description: dict[str, Any],
    recorder: _Recorder,
    start: int,
    report: Report,
) -> Checkpoint | None:
    """Steps start..steps-1; the last checkpoint, if one was written."""
    parallel = step.parallel
    prompts = Prompts(build_text_encoder(job.text, parallel.device), job.flow, dataset.info.fps)
    store = LatentStore(dataset, config.cache_bytes)
    maker = BatchMaker(store, prompts, config, job.flow, dataset.info.convention)
    held_out = HeldOut.open(job.dataset, prompts, job.flow, config) if config.eval_every else None
    folder: Path | None = None
    began = time.perf_counter()
    batches = maker.batches(
        make_sampler(config, dataset), start, config.steps, parallel.rank, parallel.world
    )
    for plan, batch in batches:
        waited = time.perf_counter() - began
        metrics = step.run(plan.step, batch.to(parallel.device))
        seconds = time.perf_counter() - began
        costs = _costs(config, job, step, plan, batch.x_noisy.shape, seconds)
        recorder.add(metrics, {"step_s": seconds, "data_wait_s": waited, **costs})
        taken = plan.step + 1
        if held_out is not None and (taken % config.eval_every == 0 or taken == config.steps):
            step.swap_ema()
            nats = held_out.mean_nats(step.model.flow, parallel)
            step.swap_ema()
            recorder.annotate({"held_out_nats_per_dim": nats})
        if taken % config.log_every == 0:
            recorder.flush()
        if taken % config.checkpoint_every == 0 or taken == config.steps:
            recorder.flush(durable=True)
            folder = save_checkpoint(
                job.checkpoints, taken, step.state(), description, parallel, config.keep
            )
            report(recorder.last)
        began = time.perf_counter()
    return None if folder is None else Checkpoint(folder, config.steps, description)


def run_digest(description: dict[str, Any], steps: int) -> str:
    """Names a finished run: what was trained, and for how long."""
    return digest_of({"description": description, "steps": steps})
