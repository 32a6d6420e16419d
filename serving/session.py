"""One video being made: prompt → latents → frames, as two half-sessions that may live in two
processes.

`DeepSession` encodes the text and inverts the deep block, one frame of u at a time.
`DecoderSession` takes those frames and gives RGB: shallow inverse, denoiser, codec. The Ray Serve
replicas hold one each and pass bytes between them; `generate` holds both in one process. The code
is the same, so the frames are the same. Knows nothing of HTTP or Ray.

Shapes: x latents [B, T, C, h, w]; u tokens [B, T, H, W, C] (H, W the token grid); frames uint8 [T,
height, width, 3].
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flow.certificate import Certificate, certificate
from flow.codec import VideoCodec
from flow.counters import Counters, Work
from flow.flow import FlowModel
from flow.model_folder import ModelSpec, load_model
from flow.prompt import format_prompt
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream, FrameStream, frame_noise
from flow.shallow import SHALLOW_TOLERANCE
from flow.text import TextEncoder, build_text_encoder
from serving.config import Sampler
from serving.messages import (
    Chunk,
    DeepFrame,
    Frames,
    GeneratedVideo,
    Opening,
    PackedTensor,
    Span,
    Stage,
    join,
)
from serving.requests import (
    CELL_PIXELS,
    TEMPORAL_FACTOR,
    Generation,
    InvalidRequest,
    ModelFacts,
)

Device = Literal["cpu", "cuda"]

# Noise is drawn from (seed, n): n counts latent frames, so what is drawn beside them takes n far
# away.
_POSTERIOR_NOISE_INDEX = 1 << 30


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory; a stage that needs no codec or no text encoder holds none."""

    model: FlowModel
    spec: ModelSpec
    facts: ModelFacts
    device: Device
    codec: VideoCodec | None
    text_encoder: TextEncoder | None
    sampler: Sampler = field(default_factory=Sampler)

    @property
    def latent_grid(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        cell = self.facts.cell_pixels
        return self.facts.height // cell, self.facts.width // cell


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
        name, video.num_frames, video.height, video.width, float(video.fps), video.cell_pixels
    )


_NOT_OF_STAGE: dict[Stage, tuple[str, ...]] = {
    "deep": ("flow.shallow", "denoiser"),
    "decode": ("flow.deep.layers",),
}
"""Modules of `FlowModel` that a stage can do without."""


def load(
    model_dir: str | Path,
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    sampler: Sampler | None = None,
    stage: Stage | None = None,
) -> LoadedModel:
    """Read a model folder as `flow.model_folder.save_model` writes it.

    Args:
        stage: read only what this stage needs; None reads all.

    Raises:
        CheckpointError, CodecError, TextError: a part is missing or does not fit.
        InvalidRequest: see `model_facts`.
    """
    folder = Path(model_dir)
    leave_out = _NOT_OF_STAGE[stage] if stage else ()
    model, spec = load_model(folder, device=device, dtype=dtype, leave_out=leave_out)
    model.requires_grad_(False)
    facts = model_facts(spec, folder.name)
    codec = None if stage == "deep" else load_codec(folder, spec, device)
    text_encoder = None if stage == "decode" else build_text_encoder(spec.text, device)
    return LoadedModel(model, spec, facts, device, codec, text_encoder, sampler or Sampler())


def load_codec(folder: Path, spec: ModelSpec, device: Device) -> VideoCodec:
    """The codec that a model names: a folder inside the model's, any folder, or a hub id."""
    assert spec.codec is not None
    inside = folder / spec.codec
    codec = VideoCodec.load(inside if inside.is_dir() else spec.codec, device)
    if spec.codec_digest is not None and codec.digest != spec.codec_digest:
        raise InvalidRequest(
            f"The codec at {spec.codec!r} has digest {codec.digest}, but the model was trained on "
            f"latents of {spec.codec_digest}: put that codec back, or train for this one."
        )
    found = (codec.factors.space, codec.latent_channels)
    needed = (spec.video.cell_pixels if spec.video else CELL_PIXELS, spec.flow.latent_channels)
    if found != needed or (spec.flow.video and codec.factors.time != TEMPORAL_FACTOR):
        raise InvalidRequest(
            f"The codec at {spec.codec!r} makes {found[1]} channels of {found[0]} pixels and "
            f"{codec.factors.time} frames; the model reads {needed[1]} of {needed[0]} pixels"
            + (f" and {TEMPORAL_FACTOR} frames." if spec.flow.video else ".")
        )
    if spec.latents is not None:
        codec.convention = spec.latents.with_statistics_of(codec.convention)
    return codec


def prompt_text(caption: str, loaded: LoadedModel) -> str:
    """The caption as the model was trained to read it."""
    config, facts = loaded.model.config, loaded.facts
    fps = facts.fps if config.video else 0.0
    return format_prompt(
        caption,
        fps=fps if config.prompt_fps else None,
        noise_std=config.noise_std if config.prompt_noise else None,
        aspect_ratio=facts.aspect_ratio if config.prompt_aspect else None,
    )


def sample_spec(request: Generation, loaded: LoadedModel) -> SampleSpec:
    """How the flow samples this request; beyond the trained length the context slides by half a
    window.
    """
    window = 1 + (loaded.facts.num_frames - 1) // TEMPORAL_FACTOR
    sampler = loaded.sampler
    return SampleSpec(
        seed=request.seed,
        num_frames=request.latent_frames,
        grid=loaded.latent_grid,
        guidance=request.guidance,
        schedule=request.schedule,
        block_size=sampler.block_size,
        tolerance=sampler.tolerance,
        window_frames=window,
        context_frames=sampler.context_frames or max(1, window // 2),
    )


def fit_image(image_HWC: Frames, height: int, width: int) -> Frames:
    """Scale an image to cover (height, width) and crop its centre: uint8 [height, width, 3]."""
    rows, columns = image_HWC.shape[:2]
    scale = max(height / rows, width / columns)
    size = (max(width, round(columns * scale)), max(height, round(rows * scale)))
    scaled = np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS))
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])


@torch.inference_mode()
def encode_first_frame(loaded: LoadedModel, request: Generation, image_HWC: Frames) -> PackedTensor:
    """u of a given first frame, [1, 1, H, W, C]: codec, latent convention, + σ·ε, forward through
    the shallow stack (arXiv 2511.20462, image-to-video). The noise comes from the request's
    seed."""
    codec, model = loaded.codec, loaded.model
    assert codec is not None, "only the decoding stage, which has the codec, takes images"
    fitted = fit_image(image_HWC, loaded.facts.height, loaded.facts.width)
    mean_BTCHW, logvar_BTCHW = codec.encode(torch.from_numpy(fitted)[None, None])

    def noise(index: int) -> Tensor:
        drawn = frame_noise(request.seed, index, tuple(mean_BTCHW.shape[2:]))
        return drawn[None, None].to(mean_BTCHW.device)

    posterior = noise(_POSTERIOR_NOISE_INDEX) if codec.convention.posterior_noise else None
    x_BTCHW = codec.convention.to_model(mean_BTCHW, logvar_BTCHW, posterior)
    x_BTCHW = x_BTCHW + model.config.noise_std * noise(0)
    dtype = next(model.parameters()).dtype
    return PackedTensor.pack(model.flow.shallow_forward(x_BTCHW.to(dtype)))


class DeepSession:
    """Text and deep block of one request. `opening` first, then `next()` for each latent frame, or
    iterate. With `emitted`, the frames of u made before, it goes on after them as if uninterrupted.
    """

    @torch.inference_mode()
    def __init__(
        self,
        loaded: LoadedModel,
        request: Generation,
        first_u: PackedTensor | None = None,
        emitted: Sequence[PackedTensor] = (),
    ) -> None:
        assert loaded.text_encoder is not None
        self.request = request
        dtype = next(loaded.model.parameters()).dtype
        texts = [prompt_text(request.prompt, loaded), prompt_text("", loaded)]
        both_BLD = loaded.text_encoder.encode(texts)
        self.opening = Opening(PackedTensor.pack(both_BLD[:1]))
        both_BLD = both_BLD.to(loaded.device, dtype)

        def on_device(packed: PackedTensor) -> Tensor:
            return packed.unpack(loaded.device).to(dtype)

        self._stream = DeepStream(
            loaded.model.flow,
            both_BLD[:1],
            both_BLD[1:],
            sample_spec(request, loaded),
            first_frame_u=None if first_u is None else on_device(first_u),
            emitted=[on_device(u) for u in emitted],
        )
        self._given = 0 if first_u is None else 1
        self._texts = both_BLD
        self.index = len(emitted)

    @property
    def counters(self) -> Counters:
        """What the deep block took so far."""
        return self._stream.counters

    def certify(self, frames: Sequence[PackedTensor]) -> Certificate:
        """How exact all frames of u are, by one parallel pass over each window."""
        like = self._texts
        u_BTHWC = torch.cat([u.unpack(like.device).to(like.dtype) for u in frames], dim=1)
        flow, spec = self._stream.flow, self._stream.spec
        return certificate(flow, u_BTHWC, like[:1], like[1:], spec, given_frames=self._given)

    @torch.inference_mode()
    def next(self) -> DeepFrame:
        """The next frame of u."""
        start_s = time.time()
        u = PackedTensor.pack(self._stream.next_frame())
        span = Span("deep", self.index, os.getpid(), start_s, time.time(), self.request.request_id)
        self.index += 1
        return DeepFrame(span.frame, u, span)

    def __iter__(self) -> Iterator[DeepFrame]:
        while self.index < self.request.latent_frames:
            yield self.next()


class DecoderSession:
    """Shallow inverse, denoiser and codec of one request: `push` each frame of u in order, then
    `finish`.
    """

    def __init__(self, loaded: LoadedModel, request: Generation, opening: Opening) -> None:
        assert loaded.codec is not None
        self.request = request
        self._loaded = loaded
        self._dtype = next(loaded.model.parameters()).dtype
        denoiser = loaded.sampler.denoiser
        if denoiser == "learned" and loaded.model.denoiser is None:
            denoiser = "none"
        text_1LD = opening.text.unpack(loaded.device).to(self._dtype)
        # As in `flow.sampling.sample`: who asks for an exact inverse means the shallow one too.
        self._latents = FrameStream(
            loaded.model,
            text_1LD,
            denoiser,
            shallow_tolerance=SHALLOW_TOLERANCE if loaded.sampler.tolerance else 0.0,
            sequential=request.schedule == "sequential",
            windows=[*sample_spec(request, loaded).context_windows()],
        )
        self._codec = loaded.codec.stream()
        self._next_index = 0

    @property
    def shallow_work(self) -> list[Work]:
        """What each shallow block took so far."""
        return self._latents.work

    def push(self, frame: DeepFrame) -> Chunk:
        """RGB frames that this frame of u makes ready; none while the denoiser still waits to look
        ahead.
        """
        assert frame.index == self._next_index, f"frame {frame.index} came for {self._next_index}"
        self._next_index += 1
        u_BTHWC = frame.u.unpack(self._loaded.device).to(self._dtype)
        chunk = self._decode(lambda: self._latents.push(u_BTHWC), frame.index)
        return Chunk(chunk.frames, (frame.span, *chunk.spans))

    def finish(self) -> Chunk:
        """The frames still held back."""
        return self._decode(self._latents.finish, self._next_index - 1)

    @torch.inference_mode()
    def _decode(self, clean_latents: Callable[[], list[Tensor]], index: int) -> Chunk:
        start_s = time.time()
        height, width = self._loaded.facts.height, self._loaded.facts.width
        ready = [np.empty((0, height, width, 3), dtype=np.uint8)]
        for x_BCHW in clean_latents():
            ready.append(self._codec.push(x_BCHW)[0].cpu().numpy())
        span = Span("decode", index, os.getpid(), start_s, time.time(), self.request.request_id)
        return Chunk(np.concatenate(ready), (span,))


def generate(
    model: LoadedModel | str | Path,
    request: Generation,
    image_HWC: Frames | None = None,
    on_chunk: Callable[[Chunk], None] | None = None,
    *,
    certify: bool = False,
) -> GeneratedVideo:
    """The whole video in this process.

    Args:
        model: a loaded model, or a model folder.
        image_HWC: the given first frame, uint8 [H, W, 3] of any size; for a request with
            `given_first_frame`.
        on_chunk: called with each chunk as it becomes ready.
        certify: check the deep block's part by a parallel pass at the end.

    Example: `generate("runs/demo/model", Generation(request_id="a", prompt="a red square",
    num_frames=17))`
    """
    loaded = model if isinstance(model, LoadedModel) else load(model)
    if request.given_first_frame != (image_HWC is not None):
        raise InvalidRequest(
            f"given_first_frame is {request.given_first_frame}, but "
            f"{'no image was' if image_HWC is None else 'an image was'} given."
        )
    first_u = None if image_HWC is None else encode_first_frame(loaded, request, image_HWC)
    deep = DeepSession(loaded, request, first_u)
    decoder = DecoderSession(loaded, request, deep.opening)
    chunks: list[Chunk] = []

    def keep(chunk: Chunk) -> None:
        chunks.append(chunk)
        if on_chunk is not None:
            on_chunk(chunk)

    latents: list[PackedTensor] = []
    for frame in deep:
        latents.append(frame.u)
        keep(decoder.push(frame))
    keep(decoder.finish())
    counters = dataclasses.replace(deep.counters, shallow=decoder.shallow_work)
    proof = deep.certify(latents) if certify else None
    return dataclasses.replace(join(chunks, loaded.facts.fps), counters=counters, certificate=proof)
