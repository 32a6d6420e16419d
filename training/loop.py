"""The training loop of one worker: batches in, checkpoints and history out.

Starts from the newest complete checkpoint in `out/checkpoints` and goes on as if it had never
stopped. Takes `report` as a callable, and MLflow as an object that takes records. Knows nothing of
Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import Bucket
from flow.codec_factors import WAN_FACTORS, CodecFactors
from flow.config import FlowConfig
from flow.device import has_quick_bf16
from flow.flow import FlowModel
from flow.likelihood import noise_floor
from flow.text import TextSpec
from training.config import TrainConfig
from training.data.batch_sampler import BatchSampler, StepPlan
from training.data.batches import BatchMaker, LatentStore, Prompts
from training.data.latents import open_latents
from training.data.texts import open_text
from training.held_out import HeldOut
from training.parallel import Parallel, join_workers, shard_model
from training.record.history import HISTORY_NAME, History
from training.record.metrics import step_cost
from training.record.tracking import MetricsLogger, MlflowRun
from training.state.checkpoint import (
    Checkpoint,
    check_fits,
    latest_complete,
    load_checkpoint,
    save_checkpoint,
)
from training.step import StepMetrics, TrainStep

CHECKPOINTS_NAME = "checkpoints"
Report = Callable[[dict[str, Any]], None]
"""Takes the record of a step that a checkpoint was just written after."""


@dataclass(frozen=True)
class TrainJob:
    """What is trained on what, and where to: what every worker is given beside the settings.

    Attributes:
        flow, text: the model and the text encoder it reads.
        dataset: folder of prepared latents, path or URI.
        out: the run's folder; all workers must see the same one.
        factors: of the codec that made the latents.
    """

    flow: FlowConfig
    text: TextSpec
    dataset: str | Path
    out: Path
    factors: CodecFactors = WAN_FACTORS

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / CHECKPOINTS_NAME

    @property
    def history(self) -> Path:
        """File with a line for each step."""
        return self.out / HISTORY_NAME

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with which another process can make it again."""
        return {
            "flow": self.flow.to_dict(),
            "text": self.text.to_dict(),
            "dataset": str(self.dataset),
            "out": str(self.out.resolve()),
            "factors": tuple(self.factors),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainJob:
        """What `to_dict` gave."""
        return cls(
            FlowConfig.from_dict(values["flow"]),
            TextSpec(**values["text"]),
            values["dataset"],
            Path(values["out"]),
            CodecFactors(*values["factors"]),
        )

    def tokens_of(self, bucket: Bucket) -> int:
        """Tokens that the flow makes of a clip of this bucket."""
        rows, columns = self.factors.grid(bucket.height, bucket.width)
        frames = self.factors.latent_frames(bucket.frames)
        return frames * (rows // self.flow.patch_size) * (columns // self.flow.patch_size)

    def sampler(self, config: TrainConfig, buckets: Mapping[Bucket, Sequence[str]]) -> BatchSampler:
        """Which samples each step of a run on these buckets is trained on."""
        return BatchSampler(buckets, config.batches, config.seed, self.tokens_of)


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


def describe(config: TrainConfig, job: TrainJob, dataset: LatentDataset) -> dict[str, Any]:
    """All that decides which weights come out, as plain values.

    A checkpoint must have the same to be resumed.
    """
    return {
        "flow": job.flow.to_dict(),
        "text": job.text.to_dict(),
        "train": config.trajectory(),
        "dataset": {
            "codec_digest": dataset.info.codec_digest,
            "convention": dataset.info.convention.to_dict(),
            "samples": dataset.ids_digest(),
        },
    }


def settle_precision(
    config: TrainConfig, latest: Checkpoint | None, parallel: Parallel | None = None
) -> TrainConfig:
    """`auto` becomes what the run began with; of a fresh run, what all its workers are quick in.

    Without workers to ask, a fresh run's `auto` stays.
    """
    if config.precision != "auto":
        return config
    if latest is not None:
        return config.model_copy(update={"precision": latest.description["train"]["precision"]})
    if parallel is None:
        return config
    is_quick = parallel.all_agree(has_quick_bf16(parallel.device))
    return config.model_copy(update={"precision": "bf16" if is_quick else "fp32"})


def fresh_model(flow: FlowConfig, seed: int) -> FlowModel:
    """Start weights from the seed, alike on all workers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlowModel(flow)


class _Recorder:
    """Gathers a worker's step metrics and writes them out (worker 0) at reports."""

    def __init__(self, job: TrainJob, step: TrainStep, start: int, run: MlflowRun | None) -> None:
        first = step.parallel.is_first
        self.step = step
        self.noise_floor = noise_floor(job.flow.noise_std)
        self.history = History(job.history, start) if first else None
        self.logger = MetricsLogger(run if first else None)
        self.last: dict[str, Any] = {}
        self._pending: list[tuple[StepMetrics, dict[str, Any]]] = []

    def add(self, metrics: StepMetrics, extra: dict[str, Any]) -> None:
        """Take a step's metrics, without waiting for the device."""
        self._pending.append((metrics, extra))

    def annotate(self, extra: dict[str, Any]) -> None:
        """Add values to the newest step."""
        self._pending[-1][1].update(extra)

    def flush(self, *, durable: bool = False) -> None:
        """Write what was gathered; `durable` waits until it would outlive a power cut.

        Every worker reads its metrics here, and so stops with the others.
        """
        records = []
        for metrics, extra in self._pending:
            records.append({**metrics.record(), "noise_floor": self.noise_floor, **extra})
        self._pending.clear()
        if records:
            self.last = records[-1]
        if self.history is not None:
            self.history.append(records, durable=durable)
            self.logger.log(records)
        for record in records:
            self.step.check_skips(record)


def _costs(step: TrainStep, plan: StepPlan, shape: torch.Size, seconds: float) -> dict[str, float]:
    """Speed of a step: tokens per second, and MFU where the peak is known."""
    frames = shape[1] if len(shape) == 5 else 1
    cost = step_cost(
        step.model,
        step.model.config,
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
    peak = step.config.tracking.peak_flops_per_device
    if peak is not None:
        out.update(cost.utilisation(seconds, peak * step.parallel.world))
    return out


def train(
    config: TrainConfig,
    job: TrainJob,
    *,
    report: Report = lambda record: None,
    tracking: MlflowRun | None = None,
) -> LoopResult:
    """Train as one of `config.workers.count` workers until `config.steps` steps are taken.

    Args:
        report: called on every worker alike with the last step's record after each checkpoint (it
            may be a barrier).
        tracking: where worker 0 sends its metrics.

    Raises:
        CheckpointMismatch: `out` holds checkpoints of another run.
        SkippedTooOften: the run makes no progress.
        BatchSamplerError, LatentDatasetError: the data do not fit the configuration.
    """
    with join_workers(config.workers) as parallel:
        dataset = open_latents(job.dataset, "train", config.batches.resolution)
        latest = _latest(job, parallel)
        config = settle_precision(config, latest, parallel)
        description = describe(config, job, dataset)
        model = fresh_model(job.flow, config.seed)
        shard_model(model, parallel, config.workers.shard_granularity, config.precision)
        step = TrainStep(model, config, parallel)
        if latest is not None:
            check_fits(latest, description)
            load_checkpoint(latest, step.state(), parallel)
            step.after_load()
        start = latest.step if latest else 0
        recorder = _Recorder(job, step, start, tracking)
        try:
            last = _Worker(job, step, dataset, description, recorder).take_steps(start, report)
        finally:
            recorder.logger.close()
        checkpoint = last or latest or latest_complete(job.checkpoints)
        assert checkpoint is not None, "a finished loop leaves a checkpoint"
        return LoopResult(
            checkpoint, max(start, config.steps), resumed_from=latest.step if latest else None
        )


def _latest(job: TrainJob, parallel: Parallel) -> Checkpoint | None:
    """The newest complete checkpoint, if there is one."""
    if parallel.is_first:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
    # Nobody looks into the folder before it is there for all.
    parallel.barrier()
    return latest_complete(job.checkpoints)


@dataclass(frozen=True)
class _Worker:
    """One worker's part in a run, from its first step here to the last."""

    job: TrainJob
    step: TrainStep
    dataset: LatentDataset
    description: dict[str, Any]
    recorder: _Recorder

    def take_steps(self, start: int, report: Report) -> Checkpoint | None:
        """Take the steps start..steps-1; the last checkpoint, if one was written."""
        config, job, parallel = self.step.config, self.job, self.step.parallel
        encoder = open_text(job.text, job.flow, config.batches, job.dataset, parallel)
        prompts = Prompts(encoder, job.flow, self.dataset.info.fps)
        store = LatentStore(self.dataset, config.batches.cache_bytes)
        maker = BatchMaker(store, prompts, config.batches, config.seed, job.factors)
        sampler = job.sampler(config, self.dataset.buckets)
        held_out = self._held_out(prompts) if config.evaluation.every_steps else None
        checkpoint: Checkpoint | None = None
        began = time.perf_counter()
        for plan, batch in maker.batches(
            sampler, start, config.steps, parallel.rank, parallel.world
        ):
            data_wait_s = time.perf_counter() - began
            metrics = self.step.take(plan.step, batch.to(parallel.device))
            step_s = time.perf_counter() - began
            costs = _costs(self.step, plan, batch.x_noisy.shape, step_s)
            self.recorder.add(metrics, {"step_s": step_s, "data_wait_s": data_wait_s, **costs})
            count = plan.step + 1
            if held_out is not None and self._is_due(count, config.evaluation.every_steps):
                self._evaluate(held_out)
            if count % config.tracking.every_steps == 0:
                self.recorder.flush()
            if self._is_due(count, config.checkpoints.every_steps):
                # The history of these steps is on disk before the checkpoint that stands for them.
                self.recorder.flush(durable=True)
                checkpoint = self._save(count)
                report(self.recorder.last)
            began = time.perf_counter()
        return checkpoint

    def _is_due(self, count: int, every_steps: int) -> bool:
        return count % every_steps == 0 or count == self.step.config.steps

    def _held_out(self, prompts: Prompts) -> HeldOut:
        config = self.step.config
        dataset = open_latents(self.job.dataset, "held_out", config.batches.resolution)
        return HeldOut(
            LatentStore(dataset, config.batches.cache_bytes),
            prompts,
            config.evaluation,
            batch_size=config.batches.batch_size,
            seed=config.seed,
        )

    def _evaluate(self, held_out: HeldOut) -> None:
        """Measure the averaged weights, and note the loss beside the newest step."""
        self.step.swap_ema()
        nats = held_out.mean_nats(self.step.model.flow, self.step.parallel)
        self.step.swap_ema()
        self.recorder.annotate({"held_out_nats_per_dim": nats})

    def _save(self, count: int) -> Checkpoint:
        folder = save_checkpoint(
            self.job.checkpoints,
            count,
            self.step.state(),
            self.description,
            self.step.parallel,
            self.step.config.checkpoints.keep,
        )
        return Checkpoint(folder, count, self.description)
