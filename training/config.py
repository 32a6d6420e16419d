"""How a model is trained: the sections of `sections.py`, and what stands above them.

What the model is (`FlowConfig`), which text encoder it reads (`TextSpec`) and what it is trained on
(`training.run.TrainRequest`) are said elsewhere. Defaults are the paper's (arXiv 2511.20462,
section 4) where it gives a number. Knows nothing of Ray, MLflow or torch.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from training.sections import (
    FREE_ON_RESUME,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoraConfig,
    MemoryConfig,
    OptimizerConfig,
    Precision,
    Section,
    TrackingConfig,
    WorkerConfig,
)


class TrainConfig(Section):
    """Everything about a training run but the model and the data.

    >>> config = TrainConfig(
    ...     steps=300,
    ...     batches=BatchConfig(batch_size=8),
    ...     workers=WorkerConfig(strategy="fsdp", count=2),
    ... )
    >>> config.batches.batch_size // config.workers.count
    4
    >>> "workers" in config.trajectory(), config.trajectory()["batches"]["batch_size"]
    (False, 8)
    """

    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of weights, batches and all noise"
    )
    steps: int = Field(
        default=1000,
        ge=1,
        description="optimizer steps of the whole run",
        json_schema_extra=FREE_ON_RESUME,
    )
    extend: bool = Field(
        default=False,
        description="resume with another length of the cosine than the run began with: from the "
        "checkpoint on, the learning rate follows the new one",
        json_schema_extra=FREE_ON_RESUME,
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="what a fresh run's weights are, instead of random ones: a model folder, or "
        "another run's folder or checkpoint, whose averaged weights are taken; a smaller model is "
        "grown",
    )
    freeze: tuple[str, ...] = Field(
        default=(),
        description="name patterns of parameters that stay as they are, such as 'flow.shallow.*'; "
        "they have no optimizer state",
    )
    lora: LoraConfig = Field(
        default=LoraConfig(), description="adapters (LoRA) that are trained instead of the weights"
    )
    precision: Precision = Field(
        default="fp32",
        description="compute dtype; masters, reductions and log-densities are always fp32; auto: "
        "bf16 where every worker's device is quick in it, or what the run began with",
    )
    denoiser_loss: bool = Field(
        default=True, description="train the denoiser by flow-score matching in the same step"
    )
    denoiser_from_step: int = Field(
        default=0,
        ge=0,
        description="first step that trains the denoiser (its target is the flow's score)",
    )
    batches: BatchConfig = Field(default=BatchConfig(), description="what a step sees")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="how a step changes the weights"
    )
    checkpoints: CheckpointConfig = Field(
        default=CheckpointConfig(),
        description="when the run can be resumed from",
        json_schema_extra=FREE_ON_RESUME,
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(),
        description="held-out loss during the run",
        json_schema_extra=FREE_ON_RESUME,
    )
    memory: MemoryConfig = Field(
        default=MemoryConfig(),
        description="how a step fits into a device",
        json_schema_extra=FREE_ON_RESUME,
    )
    workers: WorkerConfig = Field(
        default=WorkerConfig(),
        description="which processes share the work",
        json_schema_extra=FREE_ON_RESUME,
    )
    tracking: TrackingConfig = Field(
        default=TrackingConfig(),
        description="what is recorded, and how often",
        json_schema_extra=FREE_ON_RESUME,
    )

    @model_validator(mode="after")
    def _best_is_measured(self) -> TrainConfig:
        every, measured = self.checkpoints.every_steps, self.evaluation.every_steps
        if self.checkpoints.keep_best and (not measured or every % measured):
            raise ValueError(
                f"checkpoints.keep_best is {self.checkpoints.keep_best}, but checkpoints come "
                f"every {every} steps and evaluations every {measured} (0: never); every "
                "checkpoint must be measured: make checkpoints.every_steps a multiple of "
                "evaluation.every_steps"
            )
        return self

    @model_validator(mode="after")
    def _muon_stays_on_the_device(self) -> TrainConfig:
        if self.memory.offload_optimizer and self.optimizer.kind == "muon":
            raise ValueError(
                "memory.offload_optimizer is true but optimizer.kind is 'muon', which gathers "
                "whole matrices on the device; set optimizer.kind to 'adamw' or do not offload"
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> TrainConfig:
        if self.lora.rank and self.start_from is None:
            raise ValueError(
                "train.lora trains adapters of a model; name its folder in train.start_from"
            )
        if self.lora.rank and self.freeze:
            raise ValueError(
                f"train.freeze is {list(self.freeze)} but train.lora freezes all but the adapters; "
                "leave train.freeze empty, and choose by train.lora.targets"
            )
        return self

    @model_validator(mode="after")
    def _workers_have_equal_shares(self) -> TrainConfig:
        batches, accumulate = self.batches, self.batches.accumulate
        sizes: dict[str, int] = {}
        if batches.image_ratio < 1:
            sizes |= {"batch_size": batches.batch_size} if batches.tokens is None else {}
        if batches.image_ratio > 0 and batches.image_tokens is None:
            sizes["image_batch_size"] = batches.image_batch_size
        if batches.tokens is not None or batches.image_tokens is not None:
            sizes["multiple_of"] = batches.multiple_of
        for key, size in sizes.items():
            uneven = [count for count in self.workers.counts if size % count]
            if uneven:
                name = "workers.count" if self.workers.min_count is None else "a worker count"
                raise ValueError(
                    f"batches.{key} {size} must be a multiple of {name} "
                    f"{uneven[0]}, so that every worker has an equal share"
                )
            uneven = [count for count in self.workers.counts if size % (count * accumulate)]
            if uneven:
                raise ValueError(
                    f"batches.{key} {size} must be a multiple of workers.count "
                    f"{uneven[0]} times batches.accumulate {accumulate}, so that all "
                    "micro-batches are equal; change one of the three"
                )
        return self
