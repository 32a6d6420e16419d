"""How the camera moves, from the background alone.

Between two frames a moment apart, a pixel's brightness changes by its gradient times the way that
the background went there. A pan is the same way everywhere, a zoom one in proportion to the place.
Least squares over all pixels away from the things gives the rates; where nothing shows a move, a
small prior says that there is none. Knows nothing of the things but where they are.

Shapes: T frames, H, W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from media.frames import Frames

Floats = npt.NDArray[np.floating]

_APART_S = 0.5
"""Seconds between the frames that are compared."""
LEAST_PAN, LEAST_ZOOM = 0.035, 0.05
"""Half the rates of the slowest moves: lengths and logarithms of the scale per second."""
_LEAST_SHARE = 0.08
"""Share of the changes of brightness that a move explains at least."""
_PRIOR = 0.5
"""Squared levels per pixel that a move has to explain before it is believed."""


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
    grey_THW = _halved(frames @ np.array([0.299, 0.587, 0.114], dtype=np.float32))
    free_THW = _halved(things_THW.astype(np.float32)) == 0
    free_THW = free_THW[apart:] & free_THW[:-apart]
    change_THW = (grey_THW[apart:] - grey_THW[:-apart])[:, 1:-1, 1:-1]
    mean_THW = (grey_THW[apart:] + grey_THW[:-apart]) / 2
    height, width = grey_THW.shape[1:]
    side = min(height, width)
    down_THW = (mean_THW[:, 2:, 1:-1] - mean_THW[:, :-2, 1:-1]) * side / 2
    right_THW = (mean_THW[:, 1:-1, 2:] - mean_THW[:, 1:-1, :-2]) * side / 2
    y_H1 = ((np.arange(1, height - 1) + 0.5 - height / 2) / side)[:, None]
    x_W = (np.arange(1, width - 1) + 0.5 - width / 2) / side
    away_THW = (y_H1 * down_THW + x_W * right_THW).astype(np.float32)
    free = free_THW[:, 1:-1, 1:-1]
    # Brightness may drift as a whole.
    columns = [f[free] for f in (right_THW, down_THW, away_THW)]
    seconds = apart / fps
    return _decide(np.stack([*columns, np.ones_like(columns[0])], 1), change_THW[free], seconds)


def _decide(parts_P4: Floats, change_P: Floats, seconds: float) -> Camera:
    """The move that explains the changes best, if it explains enough."""
    if len(change_P) < 100:
        return Camera("static", 0.0, 0.0, 0.0)
    parts_P4, change_P = parts_P4.astype(np.float64), change_P.astype(np.float64)
    normal_44 = parts_P4.T @ parts_P4 / len(change_P)
    right_4 = parts_P4.T @ change_P / len(change_P)
    energy = float(change_P @ change_P) / len(change_P)
    # Content goes against the camera's pan, and away from the middle when it nears.
    moves = {}
    for name, column in (("pan", 0), ("zoom", 2)):
        used = [column, 3]
        solved = np.linalg.solve(normal_44[np.ix_(used, used)] + 1e-6 * np.eye(2), right_4[used])
        gain = float(solved @ right_4[used]) - float(right_4[3] ** 2)
        moves[name] = (float(solved[0]), gain)
    rest = max(0.0, energy - float(right_4[3] ** 2))
    name = max(moves, key=lambda n: moves[n][1])
    rate, gain = moves[name]
    rate = (rate if name == "pan" else -rate) / seconds
    least = LEAST_PAN if name == "pan" else LEAST_ZOOM
    # It moves if the rate is that of a move, and the move explains a share of the changes.
    belief = min(abs(rate) / least, gain / (rest + _PRIOR) / _LEAST_SHARE)
    sure = min(1.0, abs(np.log2(belief + 1e-6)) / 0.8)
    if belief < 1:
        return Camera("static", sure, 0.0, 0.0)
    way = {"pan": ("pan left", "pan right"), "zoom": ("zoom out", "zoom in")}[name][rate > 0]
    pan, zoom = (rate, 0.0) if name == "pan" else (0.0, rate)
    return Camera(way, sure, pan, zoom)


def _halved(plane_THW: npt.NDArray[Any]) -> Floats:
    """The means of 2 × 2 pixels; an odd last row or column is left out."""
    height, width = (size // 2 * 2 for size in plane_THW.shape[1:])
    even = plane_THW[:, :height, :width]
    rows = even[:, ::2] + even[:, 1::2]
    return np.asarray((rows[..., ::2] + rows[..., 1::2]) / 4)
