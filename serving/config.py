"""Settings of the service: what it admits, how it samples, what it takes of the cluster.

A recipe holds the first three models here, each under a key of its own; `ServiceSpec` puts them
together with one model and one address. Knows nothing of Ray, HTTP or torch, and imports nothing
heavy, so that a recipe is read at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """What the service admits.

    >>> Limits(max_frames=81).queue_size
    16
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_chars: int = Field(default=4096, ge=1, description="longest prompt, in characters")
    max_frames: int = Field(
        default=481, ge=1, description="longest video, in frames (481 = 30 s at 16 fps)"
    )
    max_guidance: float = Field(default=20.0, ge=0, description="largest guidance weight w")
    default_guidance: float = Field(
        default=2.5, ge=0, description="guidance weight where none is asked for"
    )
    upload_bytes: int = Field(
        default=16 << 20, ge=1024, description="largest request body, in bytes"
    )
    image_pixels: int = Field(
        default=50_000_000, ge=1, description="largest uploaded image, in pixels"
    )
    queue_size: int = Field(default=16, ge=1, description="requests that may wait for their turn")
    concurrent: int = Field(default=2, ge=1, description="requests being generated at one time")
    deadline_s: float = Field(
        default=900.0, gt=0, description="seconds from acceptance to a finished video"
    )
    keep_frames: bool = Field(
        default=True, description="keep each video's lossless frames beside its mp4"
    )


class SamplingConfig(BaseModel):
    """How the flow is sampled where the request leaves it open: the recipe's key `sampler`.

    >>> SamplingConfig(tolerance=0).denoiser
    'learned'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block_size: int = Field(default=16, ge=1, description="tokens per Jacobi block")
    tolerance: float = Field(default=1e-3, ge=0, description="Jacobi stops at this ‖Δ‖²/‖x‖²")
    context_frames: int | None = Field(
        default=None,
        ge=1,
        description="latent frames that a video longer than a training clip reads again as it "
        "slides on; by default half of the clip",
    )
    denoiser: Literal["learned", "score", "none"] = Field(
        default="learned",
        description="what takes the noise of σ away; 'score' goes forward and backward through "
        "the whole flow over the whole clip: `flowreel sample` has it, the service, whose decoder "
        "holds no deep block, refuses it",
    )


class Resources(BaseModel):
    """What each deployment takes of the cluster.

    The defaults fit all three deployments on two CPUs, with room for Ray Data.

    >>> Resources(deep_replicas=2).decoder_replicas
    1
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    api_cpus: float = Field(default=0.2, ge=0, description="CPUs of the Api replica")
    deep_cpus: float = Field(default=0.5, ge=0, description="CPUs of each DeepBlock replica")
    decoder_cpus: float = Field(default=0.5, ge=0, description="CPUs of each FrameDecoder replica")
    deep_gpus: float = Field(
        default=0, ge=0, description="GPUs of each DeepBlock replica; 0 runs it on CPU"
    )
    decoder_gpus: float = Field(default=0, ge=0, description="GPUs of each FrameDecoder replica")
    deep_replicas: int = Field(default=1, ge=1, description="replicas of DeepBlock")
    decoder_replicas: int = Field(default=1, ge=1, description="replicas of FrameDecoder")
    threads: int = Field(
        default=1, ge=1, description="torch threads of each DeepBlock and FrameDecoder replica"
    )
    credit_frames: int = Field(
        default=3, ge=1, description="latent frames the deep block may be ahead"
    )
    restarts: int = Field(
        default=2, ge=0, description="deep block replicas a video may lose and still be finished"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="compute and weights"
    )
    ready_timeout_s: float = Field(
        default=5.0, gt=0, description="seconds for all replicas to answer /health"
    )


@dataclass(frozen=True)
class ServiceSpec:
    """One service to start: a model, an address, a data folder and the settings.

    Attributes:
        model_dir: model folder, as `flow.model_folder.save_model` writes it.
        data_dir: jobs and videos; kept when the service stops.
        host: address to listen on; loopback unless told otherwise.
        port: TCP port; 0 takes a free one.
        name: the model id that clients see; the folder's name if None.
        limits, resources, sampling: settings, as a recipe holds them.
        start_timeout_s: seconds until the service must answer that it is ready.

    >>> ServiceSpec("runs/demo/model", data_dir="runs/demo/served", port=0).model_name
    'model'
    """

    model_dir: str | Path
    data_dir: str | Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    limits: Limits = field(default_factory=Limits)
    resources: Resources = field(default_factory=Resources)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    start_timeout_s: float = 180.0

    @property
    def model_name(self) -> str:
        """The model id that clients see."""
        return self.name or Path(self.model_dir).resolve().name
