"""How the camera moves, from the background alone.

Between two frames a moment apart, a pixel's brightness changes by its gradient times the way that
the background went there. A pan is the same way everywhere, a zoom one in proportion to the place.
Least squares over all pixels away from the things gives the rates; where nothing shows a move, a
small prior says that there is none. Knows nothing of the things but where they are.

Shapes: T frames, H, W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from media.frames import Frames

Floats = npt.NDArray[np.floating]

_APART_S = 0.5
"""Seconds between the frames that are compared."""
LEAST_PAN, LEAST_ZOOM = 0.035, 0.05
"""Half the rates of the slowest moves: lengths and logarithms of the scale per second."""
_LEAST_CLARITY = 4.0
"""Standard errors that a rate differs from 0 by."""
_LEAST_GAIN = 0.1
"""Squared levels per pixel that a move explains."""
_PRIOR = 20.0
"""Squared levels per length, by which a background without contrast says that nothing moves."""


@dataclass(frozen=True)
class Camera:
    """What the camera does."""

    word: str
    confidence: float
    """0 to 1; below 0.5 it is not sure."""
    pan: float
    """Lengths per second to the right; 0 if it does not pan."""
    zoom: float
    """Logarithm of the scale per second; 0 if it does not zoom."""


def read_camera(frames: Frames, things_THW: npt.NDArray[np.bool_], fps: float) -> Camera:
    """What the camera does.

    Args:
        frames: uint8 [T, H, W, 3].
        things_THW: where things are, with a margin.
        fps: frames per second.
    """
    apart = max(1, min(round(_APART_S * fps), len(frames) - 1))
    free_THW = (_halved(things_THW.astype(np.float32)) == 0).astype(np.float32)
    luma_3 = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    # The things are left out of the blur, so that none of their colour gets into the background.
    near_THW = _blurred(free_THW)
    grey_THW = _blurred(_halved(frames @ luma_3) * free_THW) / np.maximum(near_THW, 0.1)
    free_THW *= near_THW > 0.4
    free_THW = (free_THW[apart:] * free_THW[:-apart])[:, 1:-1, 1:-1]
    change_THW = (grey_THW[apart:] - grey_THW[:-apart])[:, 1:-1, 1:-1]
    mean_THW = (grey_THW[apart:] + grey_THW[:-apart]) / 2
    height, width = grey_THW.shape[1:]
    side = min(height, width)
    down_THW = (mean_THW[:, 2:, 1:-1] - mean_THW[:, :-2, 1:-1]) * (side / 2)
    right_THW = (mean_THW[:, 1:-1, 2:] - mean_THW[:, 1:-1, :-2]) * (side / 2)
    y_H1 = ((np.arange(1, height - 1) + 0.5 - height / 2) / side)[:, None].astype(np.float32)
    x_W = ((np.arange(1, width - 1) + 0.5 - width / 2) / side).astype(np.float32)
    if free_THW.sum() < 100:
        return Camera("static", 0.0, 0.0, 0.0)
    # Content goes against the camera's pan, and away from the middle when it nears.
    shifts = {"pan": right_THW, "zoom": -(y_H1 * down_THW + x_W * right_THW)}
    moves = {
        name: _Move.of(shift_THW, change_THW, free_THW, apart / fps)
        for name, shift_THW in shifts.items()
    }
    return _decide(moves["pan"], moves["zoom"])


@dataclass(frozen=True)
class _Move:
    """One kind of move, by least squares."""

    rate: float
    """Per second."""
    gain: float
    """How much of the squared change it explains, in levels per pixel."""
    clarity: float
    """The rate in standard errors, as parts of picture and video differ in it."""

    @classmethod
    def of(cls, shift_THW: Floats, change_THW: Floats, free_THW: Floats, seconds: float) -> _Move:
        """Fit the change as shift times rate, in all and in each part.

        Args:
            shift_THW: the change that a rate of 1 would make.
            change_THW: the change there is.
            free_THW: 1 for background, else 0.
            seconds: between the frames that are compared.
        """
        parts = [_sums(*part) for part in _parts(shift_THW, change_THW, free_THW)]
        cross, power, count = np.sum(parts, axis=0)
        rate = cross / (power + _PRIOR * count)
        rates = [c / (p + _PRIOR * n) for c, p, n in parts]
        shares = [p + _PRIOR * n for _, p, n in parts]
        spread = np.average((np.array(rates) - rate) ** 2, weights=shares)
        # Neighbouring parts err alike: their number is not taken for more than half.
        error = float(np.sqrt(spread / (len(parts) / 2))) + 1e-9
        return cls(rate / seconds, rate * cross / count, abs(rate) / error)


def _parts(*arrays_THW: Floats) -> list[list[Floats]]:
    """The arrays in two halves of time and four quarters of the picture."""
    frames, height, width = (size // 2 for size in arrays_THW[0].shape)
    halves = [
        [(slice(size), slice(size, None)) for size in (frames, height, width)][axis]
        for axis in range(3)
    ]
    return [[array[at] for array in arrays_THW] for at in product(*halves)]


def _sums(shift_THW: Floats, change_THW: Floats, free_THW: Floats) -> tuple[float, float, float]:
    """Shift times change, shift squared and pixels, over the background; brightness may drift."""
    count = float(free_THW.sum()) + 1e-6
    shift_THW = (shift_THW - float((shift_THW * free_THW).sum()) / count) * free_THW
    change_THW = (change_THW - float((change_THW * free_THW).sum()) / count) * free_THW
    cross = float(np.vdot(shift_THW, change_THW))
    return cross, float(np.vdot(shift_THW, shift_THW)), count


def _decide(pan: _Move, zoom: _Move) -> Camera:
    """The move that explains the changes better, if it is fast and clear enough."""
    pans = pan.gain > zoom.gain
    move, least = (pan, LEAST_PAN) if pans else (zoom, LEAST_ZOOM)
    belief = min(abs(move.rate) / least, move.clarity / _LEAST_CLARITY, move.gain / _LEAST_GAIN)
    sure = min(1.0, abs(float(np.log2(belief + 1e-6))) / 0.8)
    if belief < 1 or sure < 0.5:
        # A move that is not sure is not taken out of the things' ways.
        return Camera("static", sure, 0.0, 0.0)
    if pans:
        return Camera("pan right" if move.rate > 0 else "pan left", sure, move.rate, 0.0)
    return Camera("zoom in" if move.rate > 0 else "zoom out", sure, 0.0, move.rate)


def _blurred(plane_THW: Floats) -> Floats:
    """The binomial mean of 5 × 5 pixels, with 0 outside."""
    kernel = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    for axis in (1, 2):
        size = plane_THW.shape[axis]
        pads = [(2, 2) if at == axis else (0, 0) for at in range(3)]
        padded = np.pad(plane_THW, pads)
        shifted = (padded.take(range(k, k + size), axis=axis) for k in range(5))
        parts = [weight * part for weight, part in zip(kernel, shifted, strict=True)]
        plane_THW = np.sum(parts, axis=0)
    return np.asarray(plane_THW, dtype=np.float32)


def _halved(plane_THW: npt.NDArray[Any]) -> Floats:
    """The means of 2 × 2 pixels; an odd last row or column is left out."""
    height, width = (size // 2 * 2 for size in plane_THW.shape[1:])
    even = plane_THW[:, :height, :width]
    rows = even[:, ::2] + even[:, 1::2]
    return np.asarray((rows[..., ::2] + rows[..., 1::2]) / 4)
