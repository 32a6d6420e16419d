"""The sections of a run's settings, one for each part of training that reads it.

    section      read by                  decides
    batches      `data/`                  what a step sees
    optimizer    `optimizer/`             how a step changes the weights, or is skipped
    checkpoints  `state/`                 when the run can be resumed from
    evaluation   `held_out.py`            when and on what held-out loss is measured
    memory       `memory.py`              how a step fits into a device
    workers      `parallel.py`, `on_ray.py`  which processes share the work
    tracking     `record/`                what is recorded, and how often

`config.py` puts them together. They stand here and not in those files, because a recipe is read
before torch is imported. Knows nothing of Ray, MLflow or torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict

from flow.aspects import area_of

FREE_ON_RESUME: JsonDict = {"resume": "free"}
"""Marks a field, or a whole section, that may differ between a run and its resumption.

Such a field changes where and how long a run computes, never which weights come out.
"""

Precision = Literal["auto", "fp32", "bf16"]
Checkpointing = Literal["none", "selective", "full"]
Strategy = Literal["single", "fsdp", "hsdp", "ddp"]
ShardGranularity = Literal["layer", "block", "model"]


class Section(BaseModel):
    """Settings that cannot be changed once made; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def trajectory(self) -> dict[str, Any]:
        """The settings that decide which weights come out, as plain values.

        A resumed run must have the same; fields marked `FREE_ON_RESUME` are left out.
        """
        plain = self.model_dump(mode="json")
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if field.json_schema_extra == FREE_ON_RESUME:
                continue
            value = getattr(self, name)
            values[name] = value.trajectory() if isinstance(value, Section) else plain[name]
        return values


class BatchConfig(Section):
    """What a step sees: how many clips and images, from where, and with which captions."""

    batch_size: int = Field(default=16, ge=1, description="clips per video step, over all workers")
    image_batch_size: int = Field(
        default=16, ge=1, description="images per image step, over all workers"
    )
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="latent tokens of a video step, over all workers: every bucket has as many "
        "clips as fit; null: batch_size clips of any bucket",
    )
    image_tokens: int | None = Field(
        default=None, ge=1, description="the same for image steps; null: image_batch_size images"
    )
    multiple_of: int = Field(
        default=1,
        ge=1,
        description="with a budget of tokens, clips or images of a step are a multiple of this; "
        "a multiple of the workers, so that each has an equal share",
    )
    frames: int | None = Field(
        default=None,
        ge=1,
        description="longer clips are cut to their first so many frames, 4k+1 of them; null: whole",
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="micro-batches that a worker's share is computed in, one after another: the "
        "same step in less memory",
        json_schema_extra=FREE_ON_RESUME,
    )
    image_ratio: float = Field(
        default=0.2, ge=0, le=1, description="share of steps that are image steps"
    )
    image_source: Literal["auto", "records", "first_frames"] = Field(
        default="auto",
        description="image records, or first latent frames of clips (a causal codec encodes "
        "those alone, so they are images); auto: records where the dataset has some",
    )
    resolution: str | None = Field(
        default=None,
        description="only clips and images of this resolution, such as 480p: those whose area is "
        "within a tenth of it; null: all that the dataset holds",
    )
    caption_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="probability of the empty caption (classifier-free guidance)",
    )
    original_caption_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="probability of the original caption instead of the synthetic",
    )
    first_frame_dropout: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="probability that a video step drops the first latent frame and says "
        "'(extend) '",
    )
    cache_bytes: int = Field(
        default=2 << 30,
        ge=0,
        description="a dataset up to this many bytes of fp32 is kept in memory",
        json_schema_extra=FREE_ON_RESUME,
    )
    prefetch: bool = Field(
        default=False,
        description="make the next batch in a thread while this one is computed",
        json_schema_extra=FREE_ON_RESUME,
    )

    @field_validator("resolution")
    @classmethod
    def _is_a_resolution(cls, resolution: str | None) -> str | None:
        if resolution is not None:
            area_of(resolution)
        return resolution


class OptimizerConfig(Section):
    """How a step changes the weights, and when it is skipped instead."""

    kind: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="adamw for everything (as the paper), or muon for the matrices of the layers",
    )
    flow_learning_rate: float = Field(
        default=5e-5, gt=0, description="peak learning rate of the flow"
    )
    denoiser_learning_rate: float = Field(
        default=1e-4, gt=0, description="peak learning rate of the denoiser"
    )
    adam_betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's betas")
    adam_eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="AdamW's decay; vectors (norms, biases, sos) have none"
    )
    warmup_steps: int = Field(default=100, ge=0, description="steps of linear warm-up")
    schedule_steps: int | None = Field(
        default=None, ge=1, description="length of the cosine in steps; null: `train.steps`"
    )
    final_learning_rate_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="learning rate at the end of the cosine, as share of the peak",
    )
    clip_norm: float = Field(
        default=1.0, gt=0, description="largest gradient norm, of flow and denoiser each"
    )
    ema_decay: float = Field(
        default=0.9999,
        ge=0,
        lt=1,
        description="decay of the averaged weights per step, once warmed up",
    )
    spike_factor: float = Field(
        default=0.0,
        ge=0,
        description="skip a step whose gradient norm is over this many running medians; 0: never",
    )
    spike_median_steps: int = Field(
        default=64, ge=8, description="steps in the running median of gradient norms"
    )
    max_consecutive_skips: int = Field(
        default=20,
        ge=1,
        description="skipped steps in a row that stop the run",
        json_schema_extra=FREE_ON_RESUME,
    )

    @model_validator(mode="after")
    def _betas_are_decays(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {self.adam_betas} must lie in [0, 1)")
        return self


class LoraConfig(Section):
    """Adapters: W + (alpha / rank)·B A in the place of W, of which only A and B are trained.

    There is no dropout: a resumed run could not draw the same again.

    >>> LoraConfig(rank=8, alpha=16).targets[0]
    'flow.deep.layers.*'
    """

    rank: int = Field(
        default=0,
        ge=0,
        description="rows of A and columns of B; adapters are trained on the model folder in "
        "start_from, and nothing else is; 0: no adapters",
    )
    alpha: float = Field(default=16.0, gt=0, description="strength: B·A counts alpha / rank times")
    targets: tuple[str, ...] = Field(
        default=("flow.deep.layers.*", "denoiser.layers.*"),
        min_length=1,
        description="name patterns of the products that get an adapter",
    )


class CheckpointConfig(Section):
    """When checkpoints are written, and how many stay."""

    every_steps: int = Field(default=100, ge=1, description="steps between checkpoints")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(
        default=0,
        ge=0,
        description="older checkpoints kept besides: those of lowest held-out loss",
    )


class EvaluationConfig(Section):
    """Held-out loss during the run."""

    every_steps: int = Field(
        default=0, ge=0, description="steps between held-out evaluations; 0: none"
    )
    clips: int = Field(
        default=64,
        ge=1,
        description="held-out clips of an evaluation, of the bucket that has most; other buckets "
        "share as many again",
    )
    draws: int = Field(default=1, ge=1, description="noise draws per clip of an evaluation")


class MemoryConfig(Section):
    """How a step fits into a device: what is computed again rather than kept."""

    checkpointing: Checkpointing = Field(
        default="none",
        description="activation checkpointing, layer by layer: none keeps all that the backward "
        "pass reads; selective computes all but attention again (about a third of the "
        "activations); full keeps only what goes into a layer (about a twentieth)",
    )
    offload_optimizer: bool = Field(
        default=False,
        description="keep AdamW's moments and the averaged weights in the host's memory, and take "
        "the step there: 12 bytes a parameter less on the device, at the cost of sending gradients "
        "and weights over the bus in every step",
    )
    compile: bool = Field(
        default=False,
        description="compile every transformer layer by torch.compile: minutes at the start, and "
        "again for every new shape",
    )


class WorkerConfig(Section):
    """Which processes share the work, and how.

    >>> WorkerConfig(strategy="fsdp", count=2, shard_granularity="model").count
    2
    """

    strategy: Strategy = Field(
        default="single",
        description="single: one process; fsdp: every worker holds a part of the weights (FSDP2); "
        "hsdp: every group of shard_size workers holds all of them; ddp: every worker does",
    )
    count: int = Field(default=1, ge=1, description="training processes")
    min_count: int | None = Field(
        default=None,
        ge=1,
        description="fewest training processes: on Ray, as many train as there is room for, from "
        "this to count; null: count",
    )
    shard_size: int | None = Field(
        default=None,
        ge=2,
        description="workers that share one copy of the weights, for hsdp; usually the GPUs of a "
        "machine",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of each process")
    shard_granularity: ShardGranularity = Field(
        default="layer",
        description="what FSDP2 gathers at once; small models are quicker with fewer, bigger "
        "groups",
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="collectives; auto: nccl with GPUs, else gloo"
    )
    max_failures: int = Field(
        default=0, ge=0, description="times the worker group is restarted from the last checkpoint"
    )

    @property
    def counts(self) -> range:
        """Every number of processes that this run may have."""
        return range(self.min_count or self.count, self.count + 1)

    @model_validator(mode="after")
    def _fewest_is_no_more(self) -> WorkerConfig:
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(
                f"workers.min_count is {self.min_count}, more than workers.count {self.count}; "
                "lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _single_is_one(self) -> WorkerConfig:
        if self.strategy == "single" and self.count != 1:
            raise ValueError(
                f"workers.count is {self.count} but strategy 'single' is one process; "
                "set workers.strategy to 'fsdp' or workers.count to 1"
            )
        return self

    @model_validator(mode="after")
    def _shards_are_of_hsdp(self) -> WorkerConfig:
        if (self.strategy == "hsdp") != (self.shard_size is not None):
            raise ValueError(
                f"workers.shard_size is {self.shard_size} but strategy is '{self.strategy}'; "
                "'hsdp' needs one, and no other strategy takes one"
            )
        if self.shard_size is not None and self.count % self.shard_size:
            raise ValueError(
                f"workers.count {self.count} must be a multiple of workers.shard_size "
                f"{self.shard_size}, so that all groups are whole"
            )
        return self


class TrackingConfig(Section):
    """What is recorded of a run beside its checkpoints."""

    enabled: bool = Field(default=True, description="record the run in MLflow")
    uri: str | None = Field(
        default=None, description="MLflow store; null: SQLite file mlflow.db in the run's folder"
    )
    experiment: str = Field(default="flowreel", min_length=1, description="MLflow experiment")
    every_steps: int = Field(
        default=10, ge=1, description="steps between reports to the history and to MLflow"
    )
    samples: int = Field(
        default=0,
        ge=0,
        le=64,
        description="videos that the driver makes of the finished model, at seeds 0, 1, ... and "
        "for held-out captions, and sends with a contact sheet; 0: none (minutes each for a large "
        "model without a GPU)",
    )
    peak_flops_per_device: float | None = Field(
        default=None,
        gt=0,
        description="FLOP/s of one device at the compute dtype, for MFU; null: no MFU",
    )
