"""What is behind and before the things of a video: the background's tone, and a bar.

A bar is grey, stands still and crosses the whole picture, so its two edges are the only steps that
are as high in every row (or column). Knows nothing of the things but where they are.

Shapes: T frames, H, W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.world.vocabulary import TONES
from media.frames import Frames

Floats = npt.NDArray[np.floating]

_LEAST_STEP = 40.0
"""Levels; a bar is 75 and more from its background's mean, which varies by half of that."""
_STEP = 3
"""Pixels over which a soft edge rises."""


@dataclass(frozen=True)
class Bar:
    """Rows (axis 0) or columns (axis 1) that a bar covers, from one pixel up to another."""

    axis: int
    low: int
    high: int


@dataclass(frozen=True)
class Ground:
    """What was read of the background."""

    tone: str
    bar: Bar | None


def read_ground(frames: Frames, things_THW: npt.NDArray[np.bool_]) -> Ground:
    """Tone and bar.

    Args:
        frames: uint8 [T, H, W, 3].
        things_THW: where things are.
    """
    luma_3 = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    # Some moments are enough for what stands still.
    some = slice(None, None, max(1, len(frames) // 8))
    grey_THW = np.where(things_THW[some], np.nan, frames[some] @ luma_3)
    seen_THW = np.isfinite(grey_THW)
    count_HW = seen_THW.sum(0)
    mean_HW = np.where(seen_THW, grey_THW, 0).sum(0) / np.maximum(count_HW, 1)
    mean_HW[count_HW == 0] = np.nan
    bar = _bar(mean_HW)
    if bar is not None:
        axis_slice = [slice(None), slice(None)]
        axis_slice[bar.axis] = slice(max(0, bar.low - 1), bar.high + 1)
        mean_HW[tuple(axis_slice)] = np.nan
    rest = mean_HW[np.isfinite(mean_HW)]
    level = float(np.median(rest) if len(rest) else np.median(frames)) / 255
    return Ground(min(TONES, key=lambda tone: abs(TONES[tone] - level)), bar)


def _bar(mean_HW: Floats) -> Bar | None:
    """The bar, if two steps of opposite signs cross the picture."""
    for axis in range(2):
        lines = mean_HW if axis == 1 else mean_HW.T
        steps = lines[:, _STEP:] - lines[:, :-_STEP]
        if not np.isfinite(steps).any():
            continue
        # Half of the lines step high, and nearly all of them the same way.
        high_2, all_2 = (np.stack([_quantile(s, q) for s in (steps, -steps)]) for q in (0.5, 0.1))
        high_2[all_2 < _LEAST_STEP / 4] = 0
        up, down = (int(at) for at in high_2.argmax(1))
        if high_2.max(1).min() > _LEAST_STEP:
            low, high = sorted((up, down))
            return Bar(axis, low + _STEP // 2 + 1, high + _STEP // 2 + 1)
    return None


def _quantile(steps: Floats, share: float) -> Floats:
    """The quantile of each column, by what is known of it; lowest where too little is."""
    known = np.isfinite(steps).sum(0)
    ordered = np.sort(np.where(np.isfinite(steps), steps, np.inf), axis=0)
    at = np.minimum((share * known).astype(int), len(steps) - 1)
    found = np.take_along_axis(ordered, at[None], axis=0)[0]
    return np.where(known > len(steps) // 2, found, -np.inf)
