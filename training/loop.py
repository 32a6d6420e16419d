"""The training loop of one worker: batches in, checkpoints and history out.

Starts from the newest complete checkpoint in `out/checkpoints` and goes on as if it had never
stopped. Takes `report` as a callable. Knows nothing of Ray or MLflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import Bucket
from flow.codec_factors import WAN_FACTORS, CodecFactors
from flow.config import FlowConfig
from flow.device import has_quick_bf16
from flow.text import TextSpec
from training.config import TrainConfig
from training.data.batch_sampler import BatchSampler
from training.data.batches import BatchMaker, LatentStore, Prompts
from training.data.latents import open_latents
from training.data.texts import open_text
from training.held_out import HeldOut
from training.parallel import Parallel, join_workers
from training.record.device import StepTime
from training.record.history import HISTORY_NAME
from training.record.recorder import Recorder, cost_of
from training.start.frozen import Frozen, frozen_of
from training.start.load import load_start
from training.start.source import StartPoint
from training.state.checkpoint import (
    CHECKPOINTS_NAME,
    Checkpoint,
    check_fits,
    load_checkpoint,
)
from training.state.choice import Choice, choose_checkpoint
from training.state.group import HostGroup
from training.state.pins import changed_rate, pinned_data, pinned_schedule
from training.state.run_lock import lock_writing
from training.state.saver import Saver, want_of_room
from training.state.stop import Ask, Notice, Vote, nothing
from training.step import TrainStep
from training.weights import build_model

Report = Callable[[dict[str, Any]], None]
"""Takes the record of a step after which a checkpoint was begun."""


@dataclass(frozen=True)
class TrainJob:
    """What is trained on what, and where to: what every worker is given beside the settings.

    Attributes:
        flow, text: the model and the text encoder it reads.
        dataset: folder of prepared latents, path or URI.
        out: the run's folder; all workers must see the same one.
        factors: of the codec that made the latents.
        start: what `train.start_from` names, where it names something (`start.source.start_point`).
    """

    flow: FlowConfig
    text: TextSpec
    dataset: str | Path
    out: Path
    factors: CodecFactors = WAN_FACTORS
    start: StartPoint | None = None

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
            "start": None if self.start is None else asdict(self.start),
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
            None if values["start"] is None else StartPoint(**values["start"]),
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
        stopped: whether it was asked to leave before its end.
    """

    checkpoint: Checkpoint
    steps: int
    resumed_from: int | None
    stopped: bool = False


def describe(config: TrainConfig, job: TrainJob, dataset: LatentDataset) -> dict[str, Any]:
    """All that decides which weights come out, as plain values.

    A checkpoint must have the same to be resumed.
    """
    # Of what it started from the path is a setting; the weights behind it are named here.
    digest = job.start.digest if job.start is not None else ""
    start = {"start": {"digest": digest}} if digest else {}
    return {
        "flow": job.flow.to_dict(),
        "text": job.text.to_dict(),
        "train": config.trajectory(),
        **start,
        "schedule": pinned_schedule(config),
        "dataset": {
            "codec_digest": dataset.info.codec_digest,
            "convention": dataset.info.convention.to_dict(),
            **pinned_data(dataset),
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


def train(
    config: TrainConfig,
    job: TrainJob,
    *,
    report: Report = lambda record: None,
    ask: Ask = nothing,
) -> LoopResult:
    """Train as one of `config.workers.count` workers until `config.steps` steps are taken.

    Args:
        report: called on every worker alike with the last step's record after each checkpoint (it
            may be a barrier).
        ask: whether this worker was told to save, or to save and leave.

    Raises:
        CheckpointMismatch: `out` holds checkpoints of another run.
        FrozenChanged: parameters that `config.freeze` names have moved.
        RunBusy: workers of another run still write to `out`.
        SkippedTooOften: the run makes no progress.
        BatchSamplerError, LatentDatasetError: the data do not fit the configuration.
    """
    assert (config.start_from is None) == (job.start is None), "the driver looks up start_from"
    with ExitStack() as stack:
        parallel = stack.enter_context(join_workers(config.workers))
        dataset = open_latents(job.dataset, "train", config.batches.resolution)
        group = HostGroup.of(parallel)
        stack.enter_context(lock_writing(job.out, group))
        choice = _choose(job, group)
        latest = choice.checkpoint
        config = settle_precision(config, latest, parallel)
        # Worker 0 alone reads every manifest.
        description = group.of_first(describe(config, job, dataset) if group.is_first else {})
        step, frozen = _ready(config, job, parallel, latest, description)
        description = {**description, **frozen.described()}
        start = latest.step if latest else 0
        recorder = Recorder(step, job.history, start)
        for damage in choice.damage:
            recorder.note(damage, warn=False)  # said when it was found
        recorder.note(changed_rate(config, latest))
        recorder.note(want_of_room(job.checkpoints, step.state(), config.checkpoints, group))
        saver = Saver(job.checkpoints, description, config.checkpoints, parallel)
        stack.callback(saver.close)
        worker = _Worker(job, step, dataset, recorder, frozen, saver, Vote(group, ask))
        worker.take_steps(start, report)
        saver.finish()
        checkpoint = saver.last or latest
        assert checkpoint is not None, "a finished loop leaves a checkpoint"
        return LoopResult(
            checkpoint,
            checkpoint.step,
            resumed_from=latest.step if latest else None,
            stopped=checkpoint.step < config.steps,
        )


def _ready(
    config: TrainConfig,
    job: TrainJob,
    parallel: Parallel,
    latest: Checkpoint | None,
    description: dict[str, Any],
) -> tuple[TrainStep, Frozen]:
    """The model with its optimizers, as a checkpoint left them or as the run begins; what stays."""
    model = build_model(job.flow, config, parallel)
    if latest is None and job.start is not None:
        load_start(model, job.start)
    step = TrainStep(model, config, parallel)
    if latest is not None:
        check_fits(latest, {**description, **frozen_of(latest)}, extend=config.extend)
        load_checkpoint(latest, step.state(), parallel)
        step.after_load()
    frozen = Frozen.of(model)
    if latest is not None:
        frozen.check_loaded(latest)
    return step, frozen


def _choose(job: TrainJob, group: HostGroup) -> Choice:
    """The newest whole checkpoint, if there is one."""
    if group.is_first:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
    return choose_checkpoint(job.checkpoints, group)


@dataclass(frozen=True)
class _Worker:
    """One worker's part in a run, from its first step here to the last."""

    job: TrainJob
    step: TrainStep
    dataset: LatentDataset
    recorder: Recorder
    frozen: Frozen
    saver: Saver
    vote: Vote

    def take_steps(self, start: int, report: Report) -> None:
        """Take the steps start..steps-1, or fewer where it is asked to stop."""
        config, job, parallel = self.step.config, self.job, self.step.parallel
        encoder = open_text(job.text, job.flow, config.batches, job.dataset, parallel)
        prompts = Prompts(encoder, job.flow, self.dataset.info.fps)
        store = LatentStore(self.dataset, config.batches.cache_bytes)
        maker = BatchMaker(store, prompts, config.batches, config.seed, job.factors)
        sampler = job.sampler(config, self.dataset.buckets)
        held_out = self._held_out(prompts) if config.evaluation.every_steps else None
        clock = self.recorder.clock
        mark, began_s = clock.mark(), time.perf_counter()
        for plan, batch in maker.batches(
            sampler, start, config.steps, parallel.rank, parallel.world
        ):
            data_wait_s = time.perf_counter() - began_s
            metrics = self.step.take(plan.step, batch.to(parallel.device))
            when = StepTime(mark, clock.mark(), data_wait_s, time.time())
            cost = cost_of(self.step, plan, batch.x_noisy.shape)
            self.recorder.add(metrics, when, cost, plan.ids)
            count = plan.step + 1
            nats: float | None = None
            if held_out is not None and self._is_due(count, config.evaluation.every_steps):
                nats = self._evaluate(held_out)
            notice = self.vote.at_step()
            if notice or self._is_due(count, config.checkpoints.every_steps):
                self._save(count, nats)
                report(self.recorder.last)
            elif count % config.tracking.every_steps == 0:
                self.recorder.flush()
            if notice is Notice.STOP:
                break
            mark, began_s = clock.mark(), time.perf_counter()
        self.vote.close()

    def _is_due(self, count: int, every_steps: int) -> bool:
        return count % every_steps == 0 or count == self.step.config.steps

    def _held_out(self, prompts: Prompts) -> HeldOut:
        config = self.step.config
        dataset = open_latents(self.job.dataset, "held_out", config.batches.resolution)
        return HeldOut(
            LatentStore(dataset, config.batches.cache_bytes),
            prompts,
            config.evaluation,
            batch_size=config.batches.batch_size // config.batches.accumulate,
            seed=config.seed,
        )

    def _evaluate(self, held_out: HeldOut) -> float:
        """Measure the weights and the averaged weights, and note both beside the newest step."""
        raw = held_out.mean_nats(self.step.run_flow, self.step.parallel)
        self.step.swap_ema()
        by_bucket = held_out.nats_by_bucket(self.step.run_flow, self.step.parallel)
        self.step.swap_ema()
        nats = by_bucket[held_out.headline]
        named = {f"held_out/{bucket}": value for bucket, value in by_bucket.items()}
        means = {"held_out_nats_per_dim": nats, "held_out_raw_nats_per_dim": raw}
        self.recorder.annotate({**means, **named})
        return nats

    def _save(self, count: int, nats: float | None) -> None:
        """Begin a checkpoint; training waits for the one before, and for a copy of the state."""
        self.frozen.check(self.step.model)
        began = time.perf_counter()
        self.recorder.note(self.saver.settle())
        self.saver.stage(count, self.step.state())
        self.recorder.annotate({"checkpoint_stall_s": time.perf_counter() - began})
        # The history of these steps is on disk before the checkpoint that stands for them.
        failure = self.recorder.flush(durable=True)
        self.saver.begin(held_out=nats, error=failure)
