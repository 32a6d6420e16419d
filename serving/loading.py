"""A model folder in memory, whole or as much of it as one deployment needs.

A model folder says in its `config.json` which flow, text encoder, codec and videos it is made for;
the weights are checked against it, and the codec against the model. Knows nothing of Ray or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from flow.codec import VideoCodec
from flow.flow import FlowModel
from flow.model_folder import ModelSpec, load_model
from flow.text import TextEncoder, build_text_encoder
from serving.config import SamplingConfig
from serving.errors import InvalidRequest
from serving.messages import DeploymentName
from serving.requests import ModelFacts

Device = Literal["cpu", "cuda"]

_MODULES_LEFT_OUT: dict[DeploymentName, tuple[str, ...]] = {
    "deep": ("flow.shallow", "denoiser"),
    "decode": ("flow.deep.layers",),
}
"""Modules of `FlowModel` that a deployment can do without."""


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory; a replica that needs no codec or no text encoder holds none."""

    model: FlowModel
    spec: ModelSpec
    facts: ModelFacts
    device: Device
    codec: VideoCodec | None
    text_encoder: TextEncoder | None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Latent rows and columns (h, w)."""
        return self.facts.factors.grid(self.facts.height, self.facts.width)

    @property
    def dtype(self) -> torch.dtype:
        """What the flow's weights are held in, and computed with."""
        return next(self.model.parameters()).dtype


def model_facts(spec: ModelSpec, name: str) -> ModelFacts:
    """What the Api needs to know of a model.

    Raises:
        InvalidRequest: the model folder does not say what videos it makes.
    """
    if spec.video is None or spec.codec is None:
        missing = "video" if spec.video is None else "codec"
        raise InvalidRequest(
            f"The model {name!r} names no {missing} in its config.json, so it cannot make videos; "
            f"export it with ModelSpec({missing}=...)."
        )
    video = spec.video
    return ModelFacts(
        name, video.num_frames, video.height, video.width, float(video.fps), video.factors
    )


def load(
    model_dir: str | Path,
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    sampling: SamplingConfig | None = None,
    deployment: DeploymentName | None = None,
) -> LoadedModel:
    """Read a model folder as `flow.model_folder.save_model` writes it.

    Args:
        model_dir: the folder.
        device: where the tensors go.
        dtype: of the flow's weights; the codec's stay fp32.
        sampling: what a request leaves open.
        deployment: read only what a replica of this deployment needs; None reads all.

    Raises:
        CheckpointError, CodecError, TextError: a part is missing or does not fit.
        InvalidRequest: see `model_facts`.
    """
    folder = Path(model_dir)
    leave_out = _MODULES_LEFT_OUT[deployment] if deployment else ()
    model, spec = load_model(folder, device=device, dtype=dtype, leave_out=leave_out)
    model.requires_grad_(False)
    facts = model_facts(spec, folder.name)
    codec = None if deployment == "deep" else load_codec(folder, spec, device)
    text_encoder = None if deployment == "decode" else build_text_encoder(spec.text, device)
    return LoadedModel(
        model, spec, facts, device, codec, text_encoder, sampling or SamplingConfig()
    )


def load_codec(folder: Path, spec: ModelSpec, device: Device) -> VideoCodec:
    """The codec that a model names: a folder inside the model's, any folder, or a hub id.

    Raises:
        InvalidRequest: it is another codec than the one that the model was trained with.
    """
    assert spec.codec is not None
    assert spec.video is not None
    inside = folder / spec.codec
    codec = VideoCodec.load(inside if inside.is_dir() else spec.codec, device)
    if spec.codec_digest is not None and codec.digest != spec.codec_digest:
        raise InvalidRequest(
            f"The codec at {spec.codec!r} has digest {codec.digest}, but the model was trained on "
            f"latents of {spec.codec_digest}: put that codec back, or train for this one."
        )
    of_codec, of_model = codec.factors, spec.video.factors
    if not spec.flow.video:
        # An image has no time, and older folders of image models do not state the codec's factor.
        of_model = of_model._replace(time=of_codec.time)
    if (of_codec, codec.latent_channels) != (of_model, spec.flow.latent_channels):
        raise InvalidRequest(
            f"The codec at {spec.codec!r} makes {codec.latent_channels} channels of "
            f"{of_codec.space} pixels and {of_codec.time} frames; the model reads "
            f"{spec.flow.latent_channels} of {of_model.space} pixels and {of_model.time} frames. "
            "Name the codec that it was trained with in its config.json."
        )
    if spec.latents is not None:
        codec.convention = spec.latents.with_statistics_of(codec.convention)
    return codec
