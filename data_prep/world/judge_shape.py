"""Which shape a soft outline has, and how large it is: the best of a bank of blurred templates.

A thing's outlines are laid over each other, centred, at one scale, and compared with every shape at
several radii and blurs. What is unsure in a single noisy frame is sure in their mean; that the
frames agree is asked of parts of the video.

Shapes: T frames, S parts of the video, G × G points of the outline's own grid, K templates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from data_prep.world.render import depth
from data_prep.world.vocabulary import SHAPES

Floats = npt.NDArray[np.floating]
Depth = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64], float], Floats]

_POINTS, _REACH = 29, 1.9
"""The grid: points a side, and how far it goes from the middle, in radii."""
_RATIOS = np.linspace(0.80, 1.24, 12)
_BLURS = (0.05, 0.12, 0.19, 0.27, 0.36, 0.46, 0.6)
"""Standard deviation, in radii."""
_PARTS = 6
_FLOOR = 0.004
"""Share of an outline's variance that pixels and grid alone leave unexplained."""
_MOST_LEFT = 0.085
"""Share that no shape of the world leaves."""
_MOST_BLUR = 0.5
"""Standard deviation, in radii, from which all shapes look alike."""
CENTROIDS = {"triangle": 0.2 * np.sqrt(3)}
"""How far below the middle of its box a shape's centroid lies, in radii; 0 for the others."""
AREAS = {"circle": np.pi, "square": 3.140, "triangle": 2.494, "cross": 2.592, "ring": 2.545}
"""In squared radii."""
MEAN_AREA = 2.78
_OTHERS: dict[str, Depth] = {
    "diamond": lambda y, x, radius: 0.886 * radius - (np.abs(y) + np.abs(x)) / np.sqrt(2),
    "broad": lambda y, x, radius: radius - np.hypot(1.2 * y, x / 1.2),
    "tall": lambda y, x, radius: radius - np.hypot(y / 1.2, 1.2 * x),
    "falling": lambda y, x, radius: radius - np.hypot(y + x, (y - x) / 1.4) / np.sqrt(1.4),
    "rising": lambda y, x, radius: radius - np.hypot(y - x, (y + x) / 1.4) / np.sqrt(1.4),
    "tip down": lambda y, x, radius: depth("triangle", 0.2 * np.sqrt(3) * radius - y, x, radius),
}
"""What the world does not have and a poor picture of a shape may look like: fits best, is none."""


@dataclass(frozen=True)
class Outline:
    """What was read of a thing's outline."""

    shape: str
    confidence: float
    """0 to 1; below 0.5 it is not sure."""
    ratio: float
    """Radius, in units of the radius that the grid was laid for."""
    blur: float
    """Standard deviation of the blur that fits best, in radii."""
    left: float
    """Share of the outline's variance that the best template leaves."""


def read_outline(crops_TGG: Floats, weight_T: Floats) -> Outline | None:
    """The shape of the outlines; None if no frame has a weight.

    Args:
        crops_TGG: from `crops`.
        weight_T: 0 for frames that do not count.
    """
    used_UP = crops_TGG.reshape(len(crops_TGG), -1)[weight_T > 0]
    if not len(used_UP):
        return None
    weight_U = weight_T[weight_T > 0]
    score_NRB = _scores(weight_U @ used_UP / weight_U.sum())
    left_N = 1 - score_NRB.max((1, 2)) ** 2
    best, second = np.argsort(left_N[: len(SHAPES)])[:2]
    ratio, blur = np.unravel_index(score_NRB[best].argmax(), score_NRB.shape[1:])
    # How much less the second explains; both err by a little that says nothing.
    margin_N = (left_N - left_N[best]) / (left_N + left_N[best] + _FLOOR)
    sure = min(
        1.0,
        margin_N[second] / 0.2,
        0.75 + margin_N[len(SHAPES) :].min() / 0.4,
        (_MOST_LEFT - left_N[best]) / (0.5 * _MOST_LEFT),
        (_MOST_BLUR - _BLURS[blur]) / 0.2,
    )
    sure = max(0.0, sure) * _agreement(used_UP, int(best))
    return Outline(
        SHAPES[best], float(sure), float(_RATIOS[ratio]), _BLURS[blur], float(left_N[best])
    )


def crops(cover_THW: Floats, place_T2: Floats, radius_T: Floats) -> Floats:
    """Each frame's cover on a grid around the thing, bilinear; 0 outside the picture.

    Args:
        cover_THW: the matte.
        place_T2: the thing's centroid, in pixels.
        radius_T: about the thing's radius, in pixels, to which the grid is scaled.
    """
    height, width = cover_THW.shape[1:]
    steps_G = np.linspace(-_REACH, _REACH, _POINTS)
    rows_TG = _weights(place_T2[:, :1] + radius_T[:, None] * steps_G, height)
    columns_TG = _weights(place_T2[:, 1:] + radius_T[:, None] * steps_G, width)
    return np.asarray(rows_TG @ cover_THW @ columns_TG.transpose(0, 2, 1))


def _weights(at_TG: Floats, size: int) -> Floats:
    """Bilinear weights [T, G, size] of the pixels along one axis."""
    off = np.abs(at_TG[..., None] - 0.5 - np.arange(size))
    return np.clip(1 - off, 0, None).astype(np.float32)


def _agreement(used_UP: Floats, best: int) -> float:
    """How far frames and parts of the video agree on the shape: 0.5 if three quarters do."""
    parts = [p for p in np.array_split(used_UP, _PARTS) if len(p)]
    shares = []
    for pictures_SP, slack in ((np.stack([p.mean(0) for p in parts]), 1.1), (used_UP, 1.4)):
        left_SN = 1 - _scores(pictures_SP)[:, : len(SHAPES)].max((-2, -1)) ** 2
        # A single frame is noisy: it speaks against a shape only where another fits far better.
        agrees_S = left_SN[:, best] <= slack * left_SN.min(1) + _FLOOR
        shares.append(float(agrees_S.mean()))
    return float(np.clip(0.5 + 3 * (min(shares) - 0.75), 0, 1))


def _scores(picture_P: Floats) -> Floats:
    """Correlations [..., N, R, B] of pictures [..., G * G] with all templates."""
    picture_P = picture_P - picture_P.mean(-1, keepdims=True)
    norm = np.linalg.norm(picture_P, axis=-1, keepdims=True) + 1e-9
    bank_KP = _bank()
    return (picture_P / norm @ bank_KP.T).reshape(
        *picture_P.shape[:-1], len(SHAPES) + len(_OTHERS), len(_RATIOS), len(_BLURS)
    )


@lru_cache(maxsize=1)
def _bank() -> Floats:
    """The templates [K, G * G], each with mean 0 and norm 1, around their centroids."""
    fine = 4
    step = 2 * _REACH / (_POINTS - 1)
    # Finer than the grid and wider, so that blurring has something to take from.
    points = _POINTS * fine + 60
    at = (np.arange(points) - (points - 1) / 2) * step / fine
    middle_GP = _at_grid(at)
    templates = []
    for shape in (*SHAPES, *_OTHERS):
        for ratio in _RATIOS:
            y = at[:, None] + CENTROIDS.get(shape, 0.0) * ratio
            inside = _OTHERS[shape] if shape in _OTHERS else partial(depth, shape)
            cover = np.clip(inside(y, at, float(ratio)) * fine / step + 0.5, 0, 1)
            for blur in _BLURS:
                kernel = _gaussian(at, blur) if blur else np.eye(points)
                side_GP = middle_GP @ kernel
                templates.append(side_GP @ cover @ side_GP.T)
    bank_KP = np.stack(templates).reshape(len(templates), -1)
    bank_KP -= bank_KP.mean(1, keepdims=True)
    return np.asarray(bank_KP / np.linalg.norm(bank_KP, axis=1, keepdims=True), dtype=np.float32)


def _at_grid(at: Floats) -> Floats:
    """Linear interpolation from the fine points to the grid."""
    grid_G = np.linspace(-_REACH, _REACH, _POINTS)
    return np.clip(1 - np.abs(grid_G[:, None] - at) / (at[1] - at[0]), 0, None)


def _gaussian(at: Floats, sigma: float) -> Floats:
    """A blur as a matrix over the fine points."""
    kernel = np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    return np.asarray(kernel / kernel.sum(1, keepdims=True))
