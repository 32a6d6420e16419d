"""What a run takes before it is begun: memory, operations, hours, bytes of latents.

Memory is `footprint.py`'s. Operations are those of `record/metrics.py`: 6 for each weight and token
and attention's products, causal ones in half; with checkpointing the run's hours have those of
another forward pass (a third), or of its products with weights where attention is kept. Hours are
operations over what all GPUs do at the assumed share of their peak: traffic between them, and the
pauses of data, evaluations and checkpoints, are in no figure. Every video step counts as the
largest kind. Knows nothing of recipes, files or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from flow.config import FlowConfig
from flow.flow import FlowModel
from training.config import TrainConfig
from training.footprint import Memory, StepShape, activation_bytes, count_of, memory_of
from training.hardware import USABLE, Hardware, PlanError
from training.record.metrics import step_cost
from training.sections import Checkpointing, WorkerConfig

ASSUMED_MFU = 0.4
"""Share of the peak that steps are assumed to reach; an H200 reached 0.35 to 0.48 (docs/gpu.md)."""


@dataclass(frozen=True)
class Plan:
    """What a run takes on some hardware.

    Attributes:
        parameters: of the whole model.
        memory: of one GPU, at the largest step; `largest` says which that is.
        without_checkpointing, with_full: activations' bytes at that step, by checkpointing.
        step_flops: of a video step over all GPUs; what is computed again counts in `hours` alone.
        tokens: latent tokens of the whole run.
        hours: at `mfu` of the peak.
        latent_bytes: of one clip on disk.
        fits: whether the peak is within `USABLE` of the memory.
        advice: settings that would make it fit, the least change first; empty where it fits.
    """

    hardware: Hardware
    workers: int
    strategy: str
    parameters: int
    largest: StepShape
    micro_batch: int
    memory: Memory
    without_checkpointing: float
    with_full: float
    step_flops: float
    step_s: float
    tokens: float
    hours: float
    mfu: float
    latent_bytes: int
    fits: bool
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """What is planned: a model, how it is trained, and the kinds of steps it takes.

    Attributes:
        videos: every kind of video step, `batch` being that of the whole step; empty for images.
        images: the kind of image step; None where there is none.
        has_logvar: whether latents are kept with their variance.
    """

    flow: FlowConfig
    config: TrainConfig
    videos: tuple[StepShape, ...]
    images: StepShape | None
    has_logvar: bool = True


def make_plan(job: Job, hardware: Hardware) -> Plan:
    """What the job takes on the hardware, all of whose GPUs train.

    Raises:
        PlanError: a batch that the GPUs cannot share equally.
    """
    job = replace(job, config=_on(job.config, hardware.count))
    with torch.device("meta"):
        model = FlowModel(job.flow)
    plan = _plan(job, model, hardware)
    return plan if plan.fits else replace(plan, advice=tuple(_advice(job, model, hardware)))


def _on(config: TrainConfig, count: int) -> TrainConfig:
    """The settings with as many workers as there are GPUs, in bf16 where that is left open."""
    workers = config.workers
    if workers.count != count:
        size = workers.shard_size
        if size is not None and count % size:
            raise PlanError(f"{count} GPUs are no whole groups of workers.shard_size {size}")
        values: dict[str, Any] = {"count": count}
        if count == 1 or workers.strategy == "single":
            values.update(strategy="single" if count == 1 else "fsdp", shard_size=None)
        workers = WorkerConfig(**{**workers.model_dump(), **values})
    precision = "bf16" if config.precision == "auto" else config.precision
    return config.model_copy(update={"workers": workers, "precision": precision})


def _micro(shape: StepShape, config: TrainConfig) -> StepShape:
    """What one GPU computes of a step at once."""
    parts = config.workers.count * config.batches.accumulate
    if shape.batch % parts:
        raise PlanError(
            f"a batch of {shape.batch} is no multiple of {config.workers.count} GPUs times "
            f"batches.accumulate {config.batches.accumulate}; change train.batches "
            "(multiple_of, where it has a budget of tokens)"
        )
    return replace(shape, batch=shape.batch // parts)


def _kinds(job: Job) -> list[StepShape]:
    return [*job.videos, *([job.images] if job.images is not None else [])]


def _plan(job: Job, model: FlowModel, hardware: Hardware) -> Plan:
    config, gpu = job.config, hardware.gpu
    sizes = {kind: memory_of(model, config, _micro(kind, config)) for kind in _kinds(job)}
    largest = max(sizes, key=lambda kind: sizes[kind].peak)
    memory, micro = sizes[largest], _micro(largest, config)
    by_how = {
        how: max(activation_bytes(job.flow, micro, how, config.precision))
        for how in ("none", "full")
    }
    work = _work(job, model)
    seconds = hardware.count * gpu.peak_flops * ASSUMED_MFU
    channels, cells = job.flow.latent_channels, largest.frames * largest.rows * largest.columns
    return Plan(
        hardware=hardware,
        workers=config.workers.count,
        strategy=config.workers.strategy,
        parameters=count_of(model),
        largest=largest,
        micro_batch=micro.batch,
        memory=memory,
        without_checkpointing=by_how["none"],
        with_full=by_how["full"],
        step_flops=work.step_flops,
        step_s=work.step_flops * work.again / seconds,
        tokens=work.tokens,
        hours=work.flops * work.again / seconds / 3600,
        mfu=ASSUMED_MFU,
        latent_bytes=2 * (2 if job.has_logvar else 1) * channels * cells,
        fits=memory.peak <= USABLE * gpu.memory_bytes,
        advice=(),
    )


class _Work(NamedTuple):
    """Operations of the largest step and of the run, its tokens, and how much is done again."""

    step_flops: float
    flops: float
    tokens: float
    again: float


def _work(job: Job, model: FlowModel) -> _Work:
    """Every video step counted as the largest kind of them."""
    costs = {
        kind: step_cost(
            model,
            job.flow,
            batch=kind.batch,
            frames=kind.frames,
            height=kind.rows,
            width=kind.columns,
            with_denoiser=job.config.denoiser_loss and job.flow.denoiser,
        )
        for kind in _kinds(job)
    }
    video = max((costs[kind] for kind in job.videos), key=lambda c: c.tokens, default=None)
    image = costs[job.images] if job.images is not None else None
    ratio = job.config.batches.image_ratio if video is not None else 1.0
    flops = tokens = 0.0
    for cost, part in ((video, 1 - ratio), (image, ratio)):
        if cost is not None:
            flops += part * job.config.steps * (cost.matmul_flops + cost.attention_flops)
            tokens += part * job.config.steps * cost.tokens
    most = video or image
    assert most is not None, "a job has steps"
    total = most.matmul_flops + most.attention_flops
    # A forward pass is a third of a step's operations.
    again = {"none": 0.0, "selective": most.matmul_flops / total / 3, "full": 1 / 3}
    return _Work(total, flops, tokens, 1 + again[job.config.memory.checkpointing])


def _advice(job: Job, model: FlowModel, hardware: Hardware) -> Iterator[str]:
    """The first settings that fit: fewer bytes kept, smaller micro-batches, more GPUs."""
    ways: list[Checkpointing] = ["none", "selective", "full"]
    ways = ways[ways.index(job.config.memory.checkpointing) :]
    shared = job.config
    if hardware.count > 1 and shared.workers.strategy in ("ddp", "hsdp"):
        workers = WorkerConfig(strategy="fsdp", count=hardware.count)
        shared = shared.model_copy(update={"workers": workers})
    smallest = min(kind.batch for kind in _kinds(job)) // hardware.count
    offloaded = shared
    if job.config.optimizer.kind == "adamw":
        memory = shared.memory.model_copy(update={"offload_optimizer": True})
        offloaded = shared.model_copy(update={"memory": memory})
    for config in (job.config, shared, offloaded):
        for accumulate in (n for n in range(1, smallest + 1) if n >= config.batches.accumulate):
            for how in ways:
                trial = _changed(config, how, accumulate)
                try:
                    plan = _plan(replace(job, config=trial), model, hardware)
                except PlanError:
                    continue
                if plan.fits:
                    yield _in_words(job.config, trial)
                    return
    for count in (hardware.count * 2**n for n in range(1, 8)):
        kinds = [replace(kind, batch=count) for kind in _kinds(job)]
        config = _changed(_on(shared, count), "full", 1)
        more = Hardware(hardware.name, count)
        peaks = [memory_of(model, config, _micro(kind, config)).peak for kind in kinds]
        if max(peaks) <= USABLE * more.gpu.memory_bytes:
            yield (
                f"{count} GPUs with train.workers.strategy=fsdp, "
                "train.memory.checkpointing=full and one clip a GPU"
            )
            return
    yield "no number of these GPUs: shorter or smaller clips (prepare.bucket), or a smaller model"


def _changed(config: TrainConfig, how: Checkpointing, accumulate: int) -> TrainConfig:
    return config.model_copy(
        update={
            "memory": config.memory.model_copy(update={"checkpointing": how}),
            "batches": config.batches.model_copy(update={"accumulate": accumulate}),
        }
    )


def _in_words(config: TrainConfig, trial: TrainConfig) -> str:
    """The settings of a trial that differ."""
    pairs = {
        "train.memory.checkpointing": (
            config.memory.checkpointing,
            trial.memory.checkpointing,
        ),
        "train.batches.accumulate": (config.batches.accumulate, trial.batches.accumulate),
        "train.workers.strategy": (config.workers.strategy, trial.workers.strategy),
        "train.memory.offload_optimizer": (
            config.memory.offload_optimizer,
            trial.memory.offload_optimizer,
        ),
    }
    changed = {key: new for key, (old, new) in pairs.items() if old != new}
    return ", ".join(f"{key}={str(new).lower()}" for key, new in changed.items())
