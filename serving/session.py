"""One video being made: prompt → latents → frames, as two half-sessions.

`DeepSession` encodes the text and inverts the deep block, one frame of u at a time.
`DecoderSession` takes those frames and gives RGB: shallow inverse, denoiser, codec. The replicas of
the service hold one each, in two processes, and pass bytes between them; `generate` holds both in
one process. The code is the same, so the frames are the same.

Shapes: B batch, T frames; x latents [B, T, C, h, w]; u tokens [B, T, H, W, C] (H, W the token
grid); text [B, J, E] (J text tokens, E their width); RGB frames uint8 [T, height, width, 3]. Knows
nothing of HTTP or Ray.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flow.certificate import Certificate, certificate
from flow.counters import Counters, Work
from flow.prompt import prompt_for
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream, FrameStream, frame_noise
from flow.shallow import SHALLOW_TOLERANCE
from media.frames import Frames
from serving.errors import InvalidRequest
from serving.loading import LoadedModel, load
from serving.messages import (
    Chunk,
    DeepFrame,
    DeploymentName,
    GeneratedVideo,
    Opening,
    PackedTensor,
    WorkSpan,
    join,
)
from serving.requests import Generation

# Noise is drawn from (seed, n), where n counts latent frames: noise for another purpose takes an n
# that no video reaches.
_POSTERIOR_NOISE_INDEX = 1 << 30


def prompt_text(caption: str, loaded: LoadedModel, num_frames: int) -> str:
    """The caption as the model was trained to read it, for a clip of so many video frames."""
    facts = loaded.facts
    return prompt_for(
        caption,
        loaded.model.config,
        num_frames=num_frames,
        height=facts.height,
        width=facts.width,
        fps=facts.fps,
    )


def sample_spec(request: Generation, loaded: LoadedModel) -> SampleSpec:
    """How the flow samples this request.

    The deep block sees as many frames at once as a training clip has. A longer video slides on, and
    reads half a clip again each time unless the settings say otherwise.

    Raises:
        FrameCountError: the model cannot make so many frames.
    """
    factors, sampling = loaded.facts.factors, loaded.sampling
    trained_frames = factors.latent_frames(factors.near_frames(loaded.facts.num_frames)[0])
    return SampleSpec(
        seed=request.seed,
        num_frames=request.latent_frames(factors),
        grid=loaded.latent_grid,
        guidance=request.guidance,
        schedule=request.schedule,
        block_size=sampling.block_size,
        tolerance=sampling.tolerance,
        window_frames=trained_frames,
        context_frames=sampling.context_frames or max(1, trained_frames // 2),
    )


def fit_image(image_HWC: Frames, height: int, width: int) -> Frames:
    """Scale an image to cover (height, width) and crop its centre: uint8 [height, width, 3].

    >>> fit_image(np.zeros((40, 120, 3), np.uint8), 32, 64).shape
    (32, 64, 3)
    """
    rows, columns = image_HWC.shape[:2]
    scale = max(height / rows, width / columns)
    size = (max(width, round(columns * scale)), max(height, round(rows * scale)))
    cover_HWC = np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS))
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return np.ascontiguousarray(cover_HWC[top : top + height, left : left + width])


@torch.inference_mode()
def encode_first_frame(loaded: LoadedModel, request: Generation, image_HWC: Frames) -> PackedTensor:
    """A client's first frame as tokens u, [1, 1, H, W, C] (arXiv 2511.20462, image-to-video).

    The image goes through the codec and the latent convention, takes on σ·ε as every latent that
    the flow models, and runs forward through the shallow stack. The noise comes from the request's
    seed: a replica that takes the video over makes the same u.
    """
    codec, model = loaded.codec, loaded.model
    assert codec is not None, "only FrameDecoder, which holds the codec, takes images"
    frame_HWC = fit_image(image_HWC, loaded.facts.height, loaded.facts.width)
    # A copy: a picture that needs no scaling may be a view of memory that nobody may write to.
    mean_BTCHW, logvar_BTCHW = codec.encode(torch.from_numpy(frame_HWC.copy())[None, None])

    def noise(index: int) -> Tensor:
        noise_CHW = frame_noise(request.seed, index, tuple(mean_BTCHW.shape[2:]))
        return noise_CHW[None, None].to(mean_BTCHW.device)

    posterior = noise(_POSTERIOR_NOISE_INDEX) if codec.convention.posterior_noise else None
    x_BTCHW = codec.convention.to_model(mean_BTCHW, logvar_BTCHW, posterior)
    x_BTCHW = x_BTCHW + model.config.noise_std * noise(0)
    return PackedTensor.pack(model.flow.shallow_forward(x_BTCHW.to(loaded.dtype)))


class DeepSession:
    """Text encoder and deep block of one request: `opening` first, then `next` for each frame of u.

    Iterating calls `next` until the video is whole.

    Example: `for frame in DeepSession(load("runs/demo/model"), request): ...`
    """

    @torch.inference_mode()
    def __init__(
        self,
        loaded: LoadedModel,
        request: Generation,
        first_u: PackedTensor | None = None,
        earlier_u: Sequence[PackedTensor] = (),
    ) -> None:
        """Encode the text and make ready for the first frame that is wanted.

        Args:
            loaded: the model.
            request: the video.
            first_u: a client's first frame, from `encode_first_frame`.
            earlier_u: frames of u made before, `first_u` among them; the session goes on after
                them as if uninterrupted.

        Raises:
            FrameCountError: the model cannot make so many frames.
        """
        assert loaded.text_encoder is not None
        self.request = request
        spec = sample_spec(request, loaded)
        texts = [prompt_text(text, loaded, request.num_frames) for text in (request.prompt, "")]
        text_BJE = loaded.text_encoder.encode(texts)
        self.opening = Opening(PackedTensor.pack(text_BJE[:1]))
        # The caption, and the null prompt that guidance leads away from.
        self._text_BJE, self._null_BJE = text_BJE.to(loaded.device, loaded.dtype).split(1)
        self._stream = DeepStream(
            loaded.model.flow,
            self._text_BJE,
            self._null_BJE,
            spec,
            first_frame_u=None if first_u is None else self._on_device(first_u),
            emitted=[self._on_device(u) for u in earlier_u],
        )
        self._prefix_frames = 0 if first_u is None else 1
        self.index = len(earlier_u)

    @property
    def num_latent_frames(self) -> int:
        """Latent frames of the whole video."""
        return self._stream.spec.num_frames

    @property
    def counters(self) -> Counters:
        """What the deep block took so far."""
        return self._stream.counters

    def certify(self, frames: Sequence[PackedTensor]) -> Certificate:
        """How exact all frames of u are, by one parallel pass over each window of the video."""
        u_BTHWC = torch.cat([self._on_device(u) for u in frames], dim=1)
        flow, spec = self._stream.flow, self._stream.spec
        return certificate(
            flow, u_BTHWC, self._text_BJE, self._null_BJE, spec, given_frames=self._prefix_frames
        )

    @torch.inference_mode()
    def next(self) -> DeepFrame:
        """The next frame of u."""
        start_s = time.time()
        u = PackedTensor.pack(self._stream.next_frame())
        span = _span_until_now("deep", self.index, start_s, self.request)
        self.index += 1
        return DeepFrame(span.frame, u, span)

    def __iter__(self) -> Iterator[DeepFrame]:
        while self.index < self.num_latent_frames:
            yield self.next()

    def _on_device(self, packed: PackedTensor) -> Tensor:
        return packed.unpack(self._text_BJE.device).to(self._text_BJE.dtype)


class DecoderSession:
    """Shallow inverse, denoiser and codec of one request: `push` each frame of u, then `finish`."""

    def __init__(self, loaded: LoadedModel, request: Generation, opening: Opening) -> None:
        assert loaded.codec is not None
        self.request = request
        self._loaded = loaded
        denoiser = loaded.sampling.denoiser
        if denoiser == "learned" and loaded.model.denoiser is None:
            denoiser = "none"
        text_BJE = opening.text.unpack(loaded.device).to(loaded.dtype)
        # As in `flow.sampling.sample`: a tolerance of 0 asks for an exact shallow inverse too.
        self._latents = FrameStream(
            loaded.model,
            text_BJE,
            denoiser,
            shallow_tolerance=SHALLOW_TOLERANCE if loaded.sampling.tolerance else 0.0,
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
        """The RGB frames that this frame of u makes ready.

        There are none while the denoiser waits for the frame after it, to which it looks ahead.
        """
        assert frame.index == self._next_index, f"frame {frame.index} came for {self._next_index}"
        self._next_index += 1
        u_BTHWC = frame.u.unpack(self._loaded.device).to(self._loaded.dtype)
        chunk = self._decode(lambda: self._latents.push(u_BTHWC), frame.index)
        return Chunk(chunk.frames, (frame.span, *chunk.spans))

    def finish(self) -> Chunk:
        """The frames that waited for a frame after them."""
        return self._decode(self._latents.finish, self._next_index - 1)

    @torch.inference_mode()
    def _decode(self, clean_latents: Callable[[], list[Tensor]], index: int) -> Chunk:
        start_s = time.time()
        height, width = self._loaded.facts.height, self._loaded.facts.width
        # Where no latent is ready the chunk is empty, yet of the right shape.
        frames = [np.empty((0, height, width, 3), dtype=np.uint8)]
        for x_BCHW in clean_latents():
            frames.append(self._codec.push(x_BCHW)[0].cpu().numpy())
        span = _span_until_now("decode", index, start_s, self.request)
        return Chunk(np.concatenate(frames), (span,))


def _span_until_now(
    name: DeploymentName, frame: int, start_s: float, request: Generation
) -> WorkSpan:
    """The span from `start_s` until now, in this process."""
    return WorkSpan(name, frame, os.getpid(), start_s, time.time(), request.request_id)


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
        request: the video.
        image_HWC: the first frame, uint8 [H, W, 3] of any size; for a request with
            `given_first_frame`.
        on_chunk: called with each chunk as it becomes ready.
        certify: check the deep block's part by a parallel pass at the end.

    Raises:
        FrameCountError: the model cannot make so many frames.
        InvalidRequest: the request and the image do not agree on whether there is one.

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

    def take(chunk: Chunk) -> None:
        chunks.append(chunk)
        if on_chunk is not None:
            on_chunk(chunk)

    u_frames: list[PackedTensor] = []
    for frame in deep:
        u_frames.append(frame.u)
        take(decoder.push(frame))
    take(decoder.finish())
    counters = dataclasses.replace(deep.counters, shallow=decoder.shallow_work)
    proof = deep.certify(u_frames) if certify else None
    return dataclasses.replace(join(chunks, loaded.facts.fps), counters=counters, certificate=proof)
