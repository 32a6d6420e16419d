"""From noise to latents: the deep block frame by frame, then shallow inverse and denoiser.

The two halves are streams, `DeepStream` and `FrameStream`, so that they may run in different places
at the same time; `sample` is the two of them in one loop. Knows seeds, frames, context windows and
schedules. Knows nothing of prompts, codecs, sessions or where the streams run.

Source: `docs/design.md`, "Sampling".

Shapes: B batch, T latent frames, C channels, h, w latent cells, H, W tokens, N tokens of a frame, J
text tokens, E text width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from flow.counters import Counters, Work
from flow.flow import DeepShallowFlow, FlowModel
from flow.inverse import Inverter, Steps
from flow.sample_spec import ContextWindow, SampleError, SampleSpec
from flow.score import tweedie
from flow.shallow import SHALLOW_TOLERANCE, shallow_inverse
from flow.sliding import SlidingWindow, slide
from flow.tokens import frame_sequence, patchify

Noise = Callable[[int], Tensor]
"""Prior noise of a frame, by its number, as a latent [B, C, h, w]."""


def frame_noise(seed: int, n: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of frame n from (seed, n) alone, fp32 on the CPU.

    A session resumed anywhere, or sampled with another schedule or in another batch, sees the same
    noise. `shape` is that of a latent frame, [C, h, w].

    >>> torch.equal(frame_noise(7, 3, (4, 2, 2)), frame_noise(7, 3, (4, 2, 2)))
    True
    """
    digest = hashlib.sha256(f"flowreel noise {seed} {n}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def batch_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """Noise of several videos sampled as one batch, each from its own seed."""
    return lambda n: torch.stack([frame_noise(seed, n, shape) for seed in seeds])


class DeepStream:
    """The deep block's inverse, one frame u per call.

    Source: arXiv 2511.20462; `docs/design.md`, "Sampling".

    Args:
        flow: the flow; only its deep block is used.
        text_BJE, null_BJE: what the deep block reads; null_BJE only with guidance.
        spec: what to sample and how.
        first_frame_u: a given frame 0, tokens [B, 1, H, W, C] from `flow.shallow_forward`.
        emitted: frames u made before, the given one included; the stream then goes on as if it had
            not been interrupted.
        noise: prior noise by frame; `frame_noise(spec.seed, n)` by default.

    Raises:
        SampleError: size, frames or batch do not fit the model.

    >>> from flow.config import tiny
    >>> flow = DeepShallowFlow(tiny())
    >>> stream = DeepStream(flow, None, None, SampleSpec(num_frames=3, grid=(2, 2)))
    >>> frames = []
    >>> while not stream.done:
    ...     frames.append(stream.next_frame())
    >>> len(frames), frames[0].shape
    (3, torch.Size([1, 1, 2, 2, 4]))
    """

    def __init__(
        self,
        flow: DeepShallowFlow,
        text_BJE: Tensor | None,
        null_BJE: Tensor | None,
        spec: SampleSpec,
        first_frame_u: Tensor | None = None,
        emitted: Sequence[Tensor] = (),
        *,
        noise: Noise | None = None,
    ) -> None:
        p, config = flow.config.patch_size, flow.config
        if spec.grid[0] % p or spec.grid[1] % p:
            raise SampleError(f"grid = {spec.grid}: must be multiples of patch_size {p}")
        if not config.video and spec.num_frames != 1:
            raise SampleError(f"num_frames = {spec.num_frames}: an image model makes 1")
        self.flow, self.spec = flow, spec
        self.frame_index = len(emitted)
        self.counters = Counters(tokens_per_frame=spec.grid[0] // p * (spec.grid[1] // p))
        self._first = first_frame_u
        batch = _batch_of(text_BJE, first_frame_u, *emitted)
        if noise is None and batch != 1:
            raise SampleError(
                f"a batch of {batch}: pass noise (see batch_noise), one seed makes one video"
            )
        shape = (config.latent_channels, *spec.grid)
        self._noise = noise or (lambda n: frame_noise(spec.seed, n, shape).unsqueeze(0))
        self._grid = (spec.grid[0] // p, spec.grid[1] // p)
        self._tokens = self._grid[0] * self._grid[1]
        text_BJE = text_BJE if config.deep_text else None
        self.inverter = Inverter(
            flow.deep,
            flow.deep_rope(self._grid, spec.frames_per_window, text_BJE),
            batch=batch,
            text_BJE=text_BJE,
            null_BJE=null_BJE if config.deep_text else None,
            guidance=spec.guidance if config.deep_text else 0.0,
        )
        # Frames from the start of the context window on: what a restart reads.
        self._window_start = spec.window_start(min(self.frame_index, spec.num_frames - 1))
        self._recent = list(emitted[self._window_start :])
        self._restarted = False
        self._priors: dict[int, Tensor] = {}
        self._work, self._begun = Work(), 0.0

    @property
    def done(self) -> bool:
        """Whether all frames have been made."""
        return self.frame_index >= self.spec.num_frames

    def next_frame(self) -> Tensor:
        """Tokens u [B, 1, H, W, C] of the next frame, fp32 or wider."""
        self.inverter.solve(self.steps())
        return self.emit()

    def emit(self) -> Tensor:
        """The frame that `steps` has solved; the stream goes on to the next one."""
        if self.frame_index == 0 and self._first is not None:
            u_BTHWC = self._first.to(self.inverter.tokens_BLC)
        else:
            first = (self.frame_index - self._window_start) * self._tokens
            u_BNC = self.inverter.tokens_BLC[:, first : first + self._tokens]
            u_BNC = u_BNC.flip(1) if self.flow.deep_reversed else u_BNC.clone()
            u_BTHWC = rearrange(u_BNC, "b (h w) c -> b 1 h w c", h=self._grid[0])
        self._recent.append(u_BTHWC)
        self.frame_index += 1
        work = self.inverter.work.copy()
        self.counters.per_frame.append(work.since(self._work))
        self.counters.seconds.append(time.perf_counter() - self._begun)
        self._work = work
        return u_BTHWC

    def steps(self) -> Steps:
        """The schedule of the next frame, pass by pass (see `flow.inverse`); `emit` then has it."""
        n, spec, inverter, tokens = self.frame_index, self.spec, self.inverter, self._tokens
        self._begun = time.perf_counter()
        if self.done:
            raise SampleError(f"all {spec.num_frames} frames are made; start another stream")
        if n == 0 and self._first is not None:
            return 0
        self._enter_window(n)
        z_BNC = self._prior(n)
        # Not `inverter.solved`: a sliding window may have run on into this frame already.
        first = (n - self._window_start) * tokens
        if spec.schedule == "sequential":
            return (yield from inverter.sequential(z_BNC))
        if spec.schedule == "sliding":
            return (yield from self._slide(n, first, z_BNC))
        size, start_BNC, sweeps = spec.block_size, z_BNC, 0
        if first:
            # Fresh mu and sigma are a function of the frames alone: a resumed stream starts alike.
            yield from inverter.refresh()
            before = slice(first - tokens, first)
            start_BNC = inverter.mu_BLC[:, before] + inverter.sigma_BLC[:, before] * z_BNC
            size *= spec.later_block_factor
        for low in range(0, tokens, size):
            part = slice(low, min(low + size, tokens))
            sweeps += yield from inverter.jacobi(z_BNC[:, part], start_BNC[:, part], spec.tolerance)
        return sweeps

    def _prior(self, n: int) -> Tensor:
        """Noise of frame n as tokens [B, N, C] in the block's order.

        A sliding window that runs on asks for a frame twice; the last two are remembered.
        """
        if n not in self._priors:
            noise = patchify(self._noise(n).unsqueeze(1), self.flow.config.patch_size)
            z_BNC = frame_sequence(noise, self.flow.deep_reversed).to(self.inverter.tokens_BLC)
            self._priors = {m: z for m, z in self._priors.items() if m > n - 2} | {n: z_BNC}
        return self._priors[n]

    def _slide(self, n: int, first: int, z_BNC: Tensor) -> Steps:
        """The sliding schedule of frame n; its window may run on into the frame after it."""
        spec, after = self.spec, n + 1
        goes_on = after < spec.num_frames and spec.window_start(after) == self._window_start
        tolerance = spec.token_tolerance if first else spec.cold_token_tolerance
        window = SlidingWindow(
            spec.slide_tokens, spec.cold_slide_tokens, self._grid[1], self._tokens
        )
        return slide(
            self.inverter,
            torch.cat([z_BNC, self._prior(after)], dim=1) if goes_on else z_BNC,
            first,
            first + self._tokens,
            window,
            tolerance if spec.tolerance else 0.0,
        )

    def _enter_window(self, n: int) -> None:
        """Read text and known frames where the stream, or its next context window, begins."""
        start = self.spec.window_start(n)
        if self._restarted and start == self._window_start:
            return
        self._recent = self._recent[start - self._window_start :]
        self._window_start = start
        known = None
        if self._recent:
            known = frame_sequence(torch.cat(self._recent, dim=1), self.flow.deep_reversed)
        self.inverter.restart(known)
        self._restarted = True


def _batch_of(*tensors: Tensor | None) -> int:
    sizes = {len(tensor) for tensor in tensors if tensor is not None}
    if len(sizes) > 1:
        raise SampleError(f"text and frames are batches of different sizes: {sorted(sizes)}")
    return sizes.pop() if sizes else 1


class FrameStream:
    """Shallow inverse and denoiser over a video that arrives as frames u.

    There are three ways to denoise:

    - "learned" runs the model's denoiser. Its stream keeps its own caches, so outputs may come
      later.
    - "score" goes forward and backward through the flow (`flow.score`), which takes the whole clip:
      all frames come at `finish`.
    - "none" gives the noisy latents that the flow models.

    Args:
        model: the model; its deep block is used by "score" only.
        text_BJE: what denoiser and score read.
        denoiser: "learned", "score" or "none".
        shallow_tolerance: of the shallow inverse, see `flow.shallow`.
        sequential: invert the shallow blocks token by token.
        windows: for "score", the context windows in which the video was made.

    Raises:
        SampleError: an unknown way, or a model without the denoiser asked for.

    >>> from flow.config import tiny
    >>> frames = FrameStream(FlowModel(tiny()), None)
    >>> u_BTHWC = torch.randn(1, 1, 2, 2, 4)
    >>> len(frames.push(u_BTHWC)), len(frames.push(u_BTHWC)), len(frames.finish())
    (0, 1, 1)
    """

    def __init__(
        self,
        model: FlowModel,
        text_BJE: Tensor | None,
        denoiser: str = "learned",
        *,
        shallow_tolerance: float = SHALLOW_TOLERANCE,
        sequential: bool = False,
        windows: Sequence[ContextWindow] | None = None,
    ) -> None:
        if denoiser not in ("learned", "score", "none"):
            raise SampleError(f"denoiser = {denoiser!r}: must be 'learned', 'score' or 'none'")
        if denoiser == "learned" and model.denoiser is None:
            raise SampleError(
                "denoiser = 'learned': this model has none; ask for 'score' or 'none'"
            )
        self.model, self.shallow_tolerance, self.sequential = model, shallow_tolerance, sequential
        self.work = [Work() for _ in model.flow.shallow]
        """What each shallow block took so far."""
        self.denoiser, self._text, self._windows = denoiser, text_BJE, windows
        self._stream = None
        if denoiser == "learned" and model.denoiser is not None:
            self._stream = model.denoiser.stream(text_BJE)
        self._noisy: list[Tensor] = []

    def push(self, u_BTHWC: Tensor) -> list[Tensor]:
        """Take the next frame or frames; give the latents [B, C, h, w] now final, in order."""
        x_BTCHW = shallow_inverse(
            self.model.flow,
            u_BTHWC,
            tolerance=self.shallow_tolerance,
            sequential=self.sequential,
            work=self.work,
        )
        out: list[Tensor] = []
        for x_BCHW in x_BTCHW.unbind(1):
            if self.denoiser == "none":
                out.append(x_BCHW)
                continue
            self._noisy.append(x_BCHW)
            if self._stream is not None:
                out += self._clean(self._stream.push(x_BCHW))
        return out

    def finish(self) -> list[Tensor]:
        """Say that no frame follows; give the latent frames still owed."""
        if self._stream is not None:
            return self._clean(self._stream.finish())
        if not self._noisy:
            return []
        x_BTCHW, self._noisy = torch.stack(self._noisy, dim=1), []
        clean = tweedie(self.model.flow, x_BTCHW, self._text, windows=self._windows)
        return list(clean.unbind(1))

    def _clean(self, answers: list[Tensor]) -> list[Tensor]:
        ready, self._noisy = self._noisy[: len(answers)], self._noisy[len(answers) :]
        return [self.model.denoise(x, s) for x, s in zip(ready, answers, strict=True)]


def frame_stream(
    model: FlowModel, text_BJE: Tensor | None, spec: SampleSpec, denoiser: str = "learned"
) -> FrameStream:
    """The stream that turns the deep block's frames of such a sample into latents."""
    return FrameStream(
        model,
        text_BJE,
        denoiser,
        shallow_tolerance=SHALLOW_TOLERANCE if spec.tolerance else 0.0,
        sequential=spec.schedule == "sequential",
        windows=[*spec.context_windows()],
    )


def sample(
    model: FlowModel,
    text_BJE: Tensor | None,
    null_BJE: Tensor | None,
    spec: SampleSpec,
    first_frame: Tensor | None = None,
    denoiser: str = "learned",
    *,
    noise: Noise | None = None,
    counters: Counters | None = None,
) -> Tensor:
    """Latents [B, T, C, h, w] of one video, or of a batch with `noise`.

    Args:
        model: the model.
        text_BJE, null_BJE: what it reads; null_BJE only with guidance.
        spec: what to sample and how; tolerance 0 makes the shallow blocks exact too.
        first_frame: a given first latent frame [B, 1, C, h, w], its noise already in it.
        denoiser: "learned", "score" or "none", see `FrameStream`.
        noise: prior noise by frame; `frame_noise(spec.seed, n)` by default.
        counters: filled with what it took.

    Raises:
        SampleError: what `DeepStream` and `FrameStream` refuse.

    >>> from flow.config import tiny
    >>> model = FlowModel(tiny())
    >>> text_BJE, null_BJE = torch.randn(2, 1, 6, 16)
    >>> spec = SampleSpec(num_frames=3, grid=(2, 5), guidance=2.5, seed=1)
    >>> sample(model, text_BJE, null_BJE, spec).shape
    torch.Size([1, 3, 4, 2, 5])
    """
    with torch.no_grad():
        first_u = None if first_frame is None else model.flow.shallow_forward(first_frame)
    deep = DeepStream(model.flow, text_BJE, null_BJE, spec, first_u, noise=noise)
    frames = frame_stream(model, text_BJE, spec, denoiser)
    # Nobody waits for the first frame here, so the shallow blocks take all frames as one batch.
    u_BTHWC = torch.cat([deep.next_frame() for _ in range(spec.num_frames)], dim=1)
    out = frames.push(u_BTHWC) + frames.finish()
    if counters is not None:
        counters.per_frame = deep.counters.per_frame
        counters.seconds = deep.counters.seconds
        counters.tokens_per_frame = deep.counters.tokens_per_frame
        counters.shallow = frames.work
    return torch.stack(out, dim=1)
