"""Captions from pixels, without weights: colour, shape and motion of the one coloured thing.

Made for the synthetic world, and for what a model that was trained on it generates, which is soft
and a little noisy. Of real footage it says little that is true, so it is asked of none unless
`captioner.any_video` is set. Needs numpy and Pillow only.
Knows nothing of Ray or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.captions.captioner import CaptionResult
from data_prep.world.vocabulary import COLOURS, TONES
from media.frames import Frames

MEASURED_SIDE = 64
"""Frames are measured at this many pixels of the smaller side, up to twice as many."""
MIN_CHROMA = 50.0
"""Least spread between the channels, of 255, that counts as coloured."""
MIN_SHIFT = 0.04
"""Least way over the whole clip, as a share of the smaller side, that counts as motion."""
# |third| and |fourth| rotational moment: 0, 0.6 (square) and 0.8 (triangle) where edges are sharp,
# a little less here because blur rounds corners.
SHAPE_MOMENTS = {"circle": (0.0, 0.0), "square": (0.0, 0.52), "triangle": (0.72, 0.0)}


@dataclass(frozen=True)
class Measurement:
    """What was read from the pixels; None where there is no such thing."""

    colour: str | None
    shape: str | None
    motion: str
    """left, right, up, down, or still."""
    tone: str
    """dark, grey or light: brightness of what is not coloured."""
    area: float
    """Share of the picture that the coloured thing covers, 0..1."""
    shift: tuple[float, float]
    """(down, right) way of the coloured thing over the clip, in shares of the smaller side."""
    activity: float
    """Mean change between neighbouring frames, 0..255."""


class MeasuredCaptioner:
    """The captioner without weights.

    >>> MeasuredCaptioner().caption(np.full((5, 32, 32, 3), 20, dtype=np.uint8))
    'A mostly dark scene without motion.'
    """

    name = "measured"

    def caption(self, frames: Frames) -> str:
        """One sentence about uint8 frames [T, H, W, 3]; the same frames give the same one."""
        scene = measure(frames)
        if scene.colour and scene.shape:
            thing = f"{scene.colour} {scene.shape}"
            place = f"over a {scene.tone} background"
            if len(frames) == 1:
                return f"A {thing} {place}."
            if scene.motion == "still":
                return f"A {thing} stays still {place}."
            return f"A {thing} moves {scene.motion} {place}."
        look = scene.colour if scene.colour and scene.area > 0.25 else scene.tone
        if len(frames) == 1:
            return f"A mostly {look} picture."
        if scene.activity < 0.5:
            return f"A mostly {look} scene without motion."
        return f"A mostly {look} scene with {'slow' if scene.activity < 8 else 'fast'} motion."

    def caption_all(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        """A sentence for every clip."""
        return [CaptionResult(self.caption(frames)) for frames in clips]

    def close(self) -> None:
        """Do nothing: it holds nothing."""


def measure(frames: Frames) -> Measurement:
    """Read colour, shape and motion from uint8 frames [T, H, W, 3] of any size.

    Colour is the chroma-weighted mean hue of the coloured pixels, motion the line through their
    centroids, shape the rotational moments of their common outline.
    """
    frames = _reduced(frames)
    # A plane for each colour: numpy reduces an axis of three many times more slowly.
    planes = [np.ascontiguousarray(frames[..., channel]) for channel in range(3)]
    brightest, darkest = np.maximum.reduce(planes), np.minimum.reduce(planes)
    chroma_THW = brightest - darkest
    peak = float(np.quantile(chroma_THW, 0.99, method="nearest"))
    mask_THW = chroma_THW > max(MIN_CHROMA, 0.5 * peak)
    mask_THW = _without_specks(mask_THW)
    area = float(mask_THW.mean())
    activity = _activity(planes)
    tone = _tone(planes, mask_THW)
    if area < 0.004:
        return Measurement(None, None, "still", tone, area, (0.0, 0.0), activity)
    weights = chroma_THW[mask_THW].astype(np.float64)
    colour = _nearest_hue([float(weights @ plane[mask_THW]) for plane in planes])
    shift = _shift(mask_THW)
    motion = "still"
    if max(abs(shift[0]), abs(shift[1])) >= MIN_SHIFT:
        vertical = abs(shift[0]) > abs(shift[1])
        motion = ("down" if shift[0] > 0 else "up") if vertical else "right"
        if not vertical and shift[1] < 0:
            motion = "left"
    return Measurement(colour, _shape(mask_THW), motion, tone, area, shift, activity)


def _without_specks(mask_THW: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Keep pixels most of whose 3×3 neighbourhood is set: noise goes, edges stay."""
    padded = np.pad(mask_THW, ((0, 0), (1, 1), (1, 1)), mode="edge").astype(np.uint8)
    height, width = mask_THW.shape[1:]
    around = sum(
        padded[:, i : i + height, j : j + width].astype(np.uint8)
        for i in range(3)
        for j in range(3)
    )
    return np.asarray(around >= 5)


def _reduced(frames: Frames) -> Frames:
    """Large frames shrunk by a whole factor, since what is measured is coarser than their pixels.

    The smaller side keeps MEASURED_SIDE pixels at least.
    """
    factor = min(frames.shape[1:3]) // MEASURED_SIDE
    if factor < 2:
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).reduce(factor)) for frame in frames])


def _activity(planes: list[Frames]) -> float:
    """Mean change between neighbouring frames, 0..255."""
    if len(planes[0]) < 2:
        return 0.0
    changes = [np.maximum(p[1:], p[:-1]) - np.minimum(p[1:], p[:-1]) for p in planes]
    return float(np.mean([change.mean() for change in changes]))


def _tone(planes: list[Frames], mask_THW: npt.NDArray[np.bool_]) -> str:
    total_THW = sum(plane.astype(np.uint16) for plane in planes)
    rest = np.asarray(total_THW)[~mask_THW]
    brightness = float(np.median(rest)) / 3 / 255 if len(rest) else 0.5
    return min(TONES, key=lambda name: abs(TONES[name] - brightness))


def hue(rgb: npt.ArrayLike) -> float:
    """Hue angle of a colour in radians (0 red, 2π/3 green)."""
    red, green, blue = np.asarray(rgb, dtype=np.float64)
    return float(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))


def _nearest_hue(rgb: npt.ArrayLike) -> str:
    angle = hue(rgb)

    def distance(name: str) -> float:
        return float(abs(np.angle(np.exp(1j * (hue(COLOURS[name]) - angle)))))

    return min(COLOURS, key=distance)


def _centroids(mask_THW: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """[T, 2] (row, column) centroid per frame, NaN where nothing is set."""
    count_T = mask_THW.sum((1, 2)).astype(np.float64)
    count_T[count_T == 0] = np.nan
    rows = (mask_THW.sum(2) @ np.arange(mask_THW.shape[1])) / count_T
    columns = (mask_THW.sum(1) @ np.arange(mask_THW.shape[2])) / count_T
    return np.stack([rows, columns], axis=1)


def _shift(mask_THW: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(down, right) way over the clip by a straight line through the centroids."""
    centroids = _centroids(mask_THW)
    time = np.arange(len(centroids), dtype=np.float64)
    there = np.isfinite(centroids[:, 0])
    if there.sum() < 2:
        return 0.0, 0.0
    time, centroids = time[there], centroids[there]
    time = time - time.mean()
    slope = (time @ (centroids - centroids.mean(0))) / (time @ time)
    way = slope * (len(mask_THW) - 1) / min(mask_THW.shape[1:])
    return float(way[0]), float(way[1])


def rotational_moments(mask_HW: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """(spread, |third|, |fourth|): moments Σ (r/R)^k e^{ikθ} / n about the centroid.

    R is the root mean square radius. Spread is 2π R² / area: 1 for a disc, more the less compact.
    A disc has no third or fourth moment, a square only the fourth, a triangle the third.
    """
    rows, columns = np.nonzero(mask_HW)
    offsets = (columns - columns.mean()) + 1j * (rows - rows.mean())
    radius = np.sqrt((np.abs(offsets) ** 2).mean() + 1e-9)
    unit = offsets / radius
    spread = 2 * np.pi * radius**2 / len(rows)
    return float(spread), float(abs((unit**3).mean())), float(abs((unit**4).mean()))


def _shape(mask_THW: npt.NDArray[np.bool_]) -> str | None:
    """Nearest ideal shape by the median of the moments over whole outlines; None if not compact."""
    edges = (mask_THW[:, [0, -1]], mask_THW[:, :, [0, -1]])
    border_T = np.logical_or(*(np.asarray(edge.any((1, 2))) for edge in edges))
    counts_T = mask_THW.sum((1, 2))
    whole = [m for m, b, n in zip(mask_THW, border_T, counts_T, strict=True) if n >= 12 and not b]
    cut = [m for m, n in zip(mask_THW, counts_T, strict=True) if n >= 12]
    outlines = whole or cut
    if not outlines:
        return None
    spread, third, fourth = np.median([rotational_moments(m) for m in outlines], axis=0)
    if spread > 1.6:
        return None
    moments = {name: np.hypot(third - a, fourth - b) for name, (a, b) in SHAPE_MOMENTS.items()}
    return min(moments, key=lambda name: float(moments[name]))
