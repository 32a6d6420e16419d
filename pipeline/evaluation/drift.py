"""What becomes of a long video: colour, sharpness, background and likelihood, window by window.

A window has the trained length. Each figure is given by itself and as a ratio to that of the first
window: 1 is no drift. Knows pixels and latents. Knows nothing of files.

Shapes: T video frames, t latent frames, H, W pixels; frames uint8 [T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flow.likelihood import noise_floor, noisy_likelihood
from flow.sample_spec import SampleSpec
from media.frames import Frames
from pipeline.evaluation.samples import encode
from serving.loading import LoadedModel

COLOURED_SHARE = 0.05
"""The most coloured pixels of a window: their mean is its colour."""
BLAND_SHARE = 0.5
"""The least coloured pixels of a window: their mean is its background."""


@dataclass(frozen=True)
class Look:
    """What a window of a video looks like; grey levels of 255.

    Attributes:
        colour: spread between the channels (most minus least), mean of the most coloured 5% of the
            pixels.
        sharpness: root mean square of the gradient of brightness, per pixel. (Its mean would not
            do: a blurred edge is lower and wider.)
        background: brightness, mean of the least coloured half of the pixels.
    """

    colour: float
    sharpness: float
    background: float


@dataclass(frozen=True)
class Window:
    """One window of a long video, and its figures over those of the first window.

    Attributes:
        end_s: seconds from the video's beginning to the window's end.
        look: of its pixels.
        nats_per_dim: the model's own loss of its latent frames given those before, mean.
        colour_ratio, sharpness_ratio, background_ratio: over the first window's.
        excess_nats_ratio: loss above the noise floor, over the first window's: a loss may be
            negative or zero, and its own ratio would say nothing.
    """

    end_s: float
    look: Look
    nats_per_dim: float
    colour_ratio: float
    sharpness_ratio: float
    background_ratio: float
    excess_nats_ratio: float


@dataclass(frozen=True)
class Drift:
    """A long video of one prompt.

    Attributes:
        prompt: what it was to show.
        windows: the first window, and the last one before each asked length.
        nats_per_dim_by_frame: the model's own loss of every latent frame.
        worst: the largest distance of a ratio of colour, sharpness or background from 1, over all
            windows.
        worst_to_20x: the same over those within 20 times the trained length; None where the video
            is shorter than that.
    """

    prompt: str
    windows: tuple[Window, ...]
    nats_per_dim_by_frame: tuple[float, ...]
    worst: float
    worst_to_20x: float | None


def look(frames_THWC: Frames) -> Look:
    """Colour, sharpness and background of some frames.

    >>> frames = np.full((2, 8, 8, 3), 100, np.uint8)
    >>> frames[:, 2:4, 2:4, 0] = 200
    >>> found = look(frames)
    >>> found.colour, found.background
    (100.0, 100.0)
    """
    pixels = frames_THWC.astype(np.float64)
    chroma = (pixels.max(axis=-1) - pixels.min(axis=-1)).ravel()
    brightness_THW = pixels.mean(axis=-1)
    order = np.argsort(chroma, kind="stable")
    coloured = order[-max(1, round(COLOURED_SHARE * len(order))) :]
    bland = order[: max(1, round(BLAND_SHARE * len(order)))]
    down, right = np.gradient(brightness_THW, axis=(1, 2))
    return Look(
        colour=float(chroma[coloured].mean()),
        sharpness=float(np.sqrt((down**2 + right**2).mean())),
        background=float(brightness_THW.ravel()[bland].mean()),
    )


def frames_for(seconds: float, fps: float, every: int) -> int:
    """Video frames of at least so many seconds that a codec of `every` frames a latent one makes.

    >>> frames_for(30, fps=8, every=4)
    241
    """
    return 1 + every * -(-round(seconds * fps) // every)


@torch.no_grad()
def nats_by_frame(
    loaded: LoadedModel,
    frames_THWC: Frames,
    prompt: str,
    spec: SampleSpec,
    *,
    draws: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, ...]:
    """The model's own loss of every latent frame given those before, nats per dimension.

    The frames are encoded as any clip is, take on the noise of σ, and are read through the context
    windows in which the video was made.
    """
    assert loaded.codec is not None
    codec = loaded.codec
    mean, logvar = codec.encode(torch.from_numpy(np.ascontiguousarray(frames_THWC))[None])
    # Of the posterior its mean: every model here is measured on the same numbers.
    latents = codec.convention.to_model(mean, logvar, torch.zeros_like(mean)).to(loaded.dtype)
    texts = encode(loaded, [prompt], len(frames_THWC))
    found = noisy_likelihood(
        loaded.model.flow,
        latents,
        texts.text_BJE,
        draws=draws,
        seed=seed,
        windows=[*spec.context_windows()],
        progress=progress,
    )
    return tuple(float(value) for value in found.loss("frame")[:, 0].mean(dim=0))


def drift(
    frames_THWC: Frames,
    nats: Sequence[float],
    seconds: Sequence[float],
    *,
    prompt: str,
    fps: float,
    window: int,
    every: int,
    sigma: float,
) -> Drift:
    """The first window and those that end at the asked lengths.

    Args:
        frames_THWC: the video.
        nats: loss of every latent frame.
        seconds: lengths, each at most the video's; 20 times the trained length is added.
        prompt: what it was to show.
        fps: its frames per second.
        window: frames of a window.
        every: video frames of a latent frame.
        sigma: of the noise, for the floor.
    """
    far = 1 + every * (20 * (window - 1) // every)
    asked = [min(frames_for(s, fps, every), len(frames_THWC)) for s in seconds]
    reaches = len(frames_THWC) >= far
    ends = [window, *sorted({*asked, far} if reaches else {*asked})]
    looks = [look(frames_THWC[end - window : end]) for end in ends]
    losses = [_mean_nats(nats, end, window, every) for end in ends]
    floor = noise_floor(sigma)
    first, first_loss = looks[0], losses[0]
    windows = tuple(
        Window(
            end_s=end / fps,
            look=seen,
            nats_per_dim=loss,
            colour_ratio=_ratio(seen.colour, first.colour),
            sharpness_ratio=_ratio(seen.sharpness, first.sharpness),
            background_ratio=_ratio(seen.background, first.background),
            excess_nats_ratio=_ratio(loss - floor, first_loss - floor),
        )
        for end, seen, loss in zip(ends, looks, losses, strict=True)
    )
    return Drift(
        prompt,
        windows,
        tuple(nats),
        worst=_worst(windows),
        worst_to_20x=_worst(windows[: 1 + ends.index(far)]) if reaches else None,
    )


def _worst(windows: Sequence[Window]) -> float:
    ratios = [
        ratio for w in windows for ratio in (w.colour_ratio, w.sharpness_ratio, w.background_ratio)
    ]
    return max(abs(ratio - 1) for ratio in ratios)


def _mean_nats(nats: Sequence[float], end: int, window: int, every: int) -> float:
    # The first latent frame has none before it, so it is left out of the first window.
    last, count = 1 + (end - 1) // every, max(1, (window - 1) // every)
    return float(np.mean(nats[last - count : last]))


def _ratio(value: float, first: float) -> float:
    return value / first if first else float("nan")
