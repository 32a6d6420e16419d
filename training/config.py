"""How a model is trained: every knob, its unit and its rule.

Knows nothing of Ray, of MLflow or of torch. What the model is (`FlowConfig`), what it reads
(`TextSpec`) and what it is trained on are said elsewhere; this file says only how. Defaults are
the paper's (arXiv 2511.20462, section 4) where it gives a number.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Fields that may differ between a run and its resumption: they change where and how long, never
# what is computed.
FREE_ON_RESUME = frozenset(
    {
        "steps",
        "workers",
        "threads_per_worker",
        "checkpoint_every",
        "keep",
        "log_every",
        "eval_every",
        "eval_clips",
        "eval_draws",
        "backend",
        "strategy",
        "shard_granularity",
        "cache_bytes",
        "prefetch",
        "max_worker_failures",
        "max_consecutive_skips",
        "tracking",
        "tracking_uri",
        "experiment",
        "peak_flops_per_device",
    }
)


class TrainConfig(BaseModel):
    """Everything about a training run but the model and the data.

    Example: `TrainConfig(steps=300, batch_size=16, workers=2, strategy="fsdp")`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, lt=2**63, description="seed of weights, batches and all noise")
    steps: int = Field(1000, ge=1, description="optimizer steps of the whole run")
    batch_size: int = Field(16, ge=1, description="clips per video step, over all workers")
    image_batch_size: int = Field(16, ge=1, description="images per image step, over all workers")
    image_ratio: float = Field(0.2, ge=0, le=1, description="share of steps that are image steps")
    image_source: Literal["auto", "records", "first_frames"] = Field(
        "auto",
        description="image records, or first latent frames of clips (a causal codec encodes "
        "those alone, so they are images); auto: records where the dataset has some",
    )

    flow_learning_rate: float = Field(5e-5, gt=0, description="peak learning rate of the flow")
    denoiser_learning_rate: float = Field(
        1e-4, gt=0, description="peak learning rate of the denoiser"
    )
    adam_betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        1e-4, ge=0, description="AdamW's decay; vectors (norms, biases, sos) have none"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    schedule_steps: int | None = Field(
        None, ge=1, description="length of the cosine in steps; null: `steps`"
    )
    final_learning_rate_ratio: float = Field(
        0.0, ge=0, le=1, description="learning rate at the end of the cosine, as share of the peak"
    )
    clip_norm: float = Field(
        1.0, gt=0, description="largest gradient norm, of flow and denoiser each"
    )
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="decay of the averaged weights per step, once warmed up"
    )

    denoiser_loss: bool = Field(
        True, description="train the denoiser by flow-score matching in the same step"
    )
    denoiser_from_step: int = Field(
        0, ge=0, description="first step that trains the denoiser (its target is the flow's score)"
    )

    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="probability of the empty caption (classifier-free guidance)"
    )
    original_caption_ratio: float = Field(
        0.1, ge=0, le=1, description="probability of the original caption instead of the synthetic"
    )
    drop_first_frame: float = Field(
        0.25,
        ge=0,
        le=1,
        description="probability that a video step drops the first latent frame and says '(extend) '",
    )

    max_consecutive_skips: int = Field(
        20, ge=1, description="skipped steps in a row that stop the run"
    )
    spike_factor: float = Field(
        0.0,
        ge=0,
        description="skip a step whose gradient norm is over this many running medians; 0: never",
    )
    spike_window: int = Field(64, ge=8, description="steps in the running median")

    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="compute dtype; masters, reductions and log-densities are always fp32"
    )
    strategy: Literal["fsdp", "single"] = Field(
        "single", description="FSDP2 over the workers, or one process"
    )
    shard_granularity: Literal["layer", "block", "model"] = Field(
        "layer",
        description="what FSDP2 gathers at once; small models are quicker with fewer, bigger groups",
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="collectives; auto: nccl with GPUs, else gloo"
    )
    workers: int = Field(1, ge=1, description="training processes")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of each process")
    cache_bytes: int = Field(
        2 << 30, ge=0, description="a dataset up to this many bytes of fp32 is kept in memory"
    )
    prefetch: bool = Field(
        False, description="make the next batch in a thread while this one is computed"
    )
    max_worker_failures: int = Field(
        0, ge=0, description="times the worker group is restarted from the last checkpoint"
    )

    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    log_every: int = Field(10, ge=1, description="steps between reports")
    eval_every: int = Field(0, ge=0, description="steps between held-out evaluations; 0: none")
    eval_clips: int = Field(64, ge=1, description="held-out clips of an evaluation")
    eval_draws: int = Field(1, ge=1, description="noise draws per clip of an evaluation")

    tracking: bool = Field(True, description="record the run in MLflow")
    tracking_uri: str | None = Field(
        None, description="MLflow store; null: SQLite file mlflow.db in the run's folder"
    )
    experiment: str = Field("flowreel", min_length=1, description="MLflow experiment")
    peak_flops_per_device: float | None = Field(
        None, gt=0, description="FLOP/s of one device at the compute dtype, for MFU; null: no MFU"
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.strategy == "single" and self.workers != 1:
            raise ValueError(
                f"workers is {self.workers} but strategy 'single' is one process; "
                "set strategy to 'fsdp' or workers to 1"
            )
        for key in ("batch_size", "image_batch_size"):
            size = getattr(self, key)
            if size % self.workers and not (key == "image_batch_size" and self.image_ratio == 0):
                raise ValueError(
                    f"{key} {size} must be a multiple of workers {self.workers}, "
                    "so that every worker has an equal share"
                )
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {self.adam_betas} must lie in [0, 1)")
        return self

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide which weights come out: a resumed run must have the same."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in FREE_ON_RESUME}
