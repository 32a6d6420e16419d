"""Where the coloured things of a video are: a soft matte of each thing in each frame.

Things are saturated, backgrounds hardly coloured. In the chroma plane (two coordinates without
brightness) a pixel that a thing covers in part lies that part of the way from grey to the thing's
colour, so the cover is a projection: linear, hence as true after a blur.

Shapes: T frames, H, W rows and columns; P coloured pixels; places are (down, right) in pixels.
Knows nothing of shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.world.vocabulary import COLOURS
from media.frames import Frames

Floats = npt.NDArray[np.floating]

LEAST_CHROMA = 45.0
"""Least distance from grey, of 255, of what is coloured; the world's colours have 160 and more."""
_LEAST_AREA = 0.006
"""Least share of the picture that a thing covers, in the frames in which it is seen most."""
_SECOND_SHARE = 0.25
"""A second thing covers at least this share of the first one's pixels."""


@dataclass(frozen=True)
class Matte:
    """One thing in all frames."""

    cover_THW: Floats
    """How much of each pixel it covers, about 0 to 1; noise goes below and above."""
    chroma_T2: Floats
    """Its mean chroma in each frame; 0 where it is not seen."""
    place_T2: Floats
    """Its middle by the coloured pixels alone, NaN where it is not seen."""
    strong_THW: npt.NDArray[np.bool_]
    """Its coloured pixels."""
    purity: float
    """Share of a frame's coloured pixels that are nearest in hue to one colour."""


def chroma_of(rgb_C: npt.ArrayLike) -> Floats:
    """The chroma [..., 2] of colours [..., 3]: 0 for grey, the angle is the hue."""
    red, green, blue = np.moveaxis(np.asarray(rgb_C, dtype=np.float32), -1, 0)
    return np.stack([red - (green + blue) / 2, np.sqrt(0.75) * (green - blue)], axis=-1)


_PALETTE_N2 = chroma_of(list(COLOURS.values())).astype(np.float64)
_HUES_N2 = (_PALETTE_N2 / np.hypot(*_PALETTE_N2.T)[:, None]).astype(np.float32)


def name_hue(chroma_2: Floats) -> tuple[str, float]:
    """The colour nearest in hue, and how sure that is.

    Sure is 1 at a colour's own hue and 0 midway between two colours.
    """
    angle = np.arctan2(chroma_2[1], chroma_2[0])
    hues_N = np.arctan2(_PALETTE_N2[:, 1], _PALETTE_N2[:, 0])
    off_N = np.abs(np.angle(np.exp(1j * (hues_N - angle))))
    best, second = np.argsort(off_N)[:2]
    return list(COLOURS)[best], float((off_N[second] - off_N[best]) / (off_N[second] + off_N[best]))


def mattes(frames: Frames) -> list[Matte]:
    """The things of a video, the most prominent first; two at most, none if nothing is coloured.

    Two hues are two things where both are seen at once and apart. Else they are one thing whose
    colour is not sure.
    """
    red, green, blue = (frames[..., c].astype(np.float32) for c in range(3))
    u_THW, v_THW = red - (green + blue) / 2, np.float32(np.sqrt(0.75)) * (green - blue)
    grey = np.hypot(u_THW, v_THW) < LEAST_CHROMA
    if grey.any():
        # A background is tinted a little.
        u_THW -= u_THW[grey].mean()
        v_THW -= v_THW[grey].mean()
    smooth_u, smooth_v = _smooth(u_THW), _smooth(v_THW)
    strength_THW = np.hypot(smooth_u, smooth_v)
    peak = float(np.quantile(strength_THW, 0.995))
    strong_THW = strength_THW > max(LEAST_CHROMA, 0.45 * peak)
    at_P3 = np.argwhere(strong_THW)
    chroma_P2 = np.stack([smooth_u[strong_THW], smooth_v[strong_THW]], axis=1)
    groups = _groups(at_P3, chroma_P2, frames.shape[:3])
    if not groups:
        return []
    found = [_Pixels(at_P3[g], chroma_P2[g]) for g in groups]
    covers = _covers(found, u_THW, v_THW)
    return [
        Matte(cover, *part.per_frame(len(frames)), part.mask(frames.shape[:3]), part.purity())
        for part, cover in zip(found, covers, strict=True)
    ]


@dataclass(frozen=True)
class _Pixels:
    """The coloured pixels of one thing."""

    at_P3: npt.NDArray[np.int64]
    chroma_P2: Floats

    def mask(self, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Where they are."""
        mask_THW = np.zeros(shape, dtype=bool)
        mask_THW[tuple(self.at_P3.T)] = True
        return mask_THW

    def purity(self) -> float:
        """The largest share of one frame's pixels that are of one colour, by the median frame."""
        hue_P = (self.chroma_P2 @ _HUES_N2.T).argmax(1)
        hues, frames = len(_HUES_N2), int(self.at_P3[:, 0].max()) + 1
        cell_P = self.at_P3[:, 0] * hues + hue_P
        count_TN = np.bincount(cell_P, minlength=hues * frames).reshape(frames, hues)
        count_TN = count_TN[count_TN.any(1)]
        return float(np.median(count_TN.max(1) / count_TN.sum(1)))

    def per_frame(self, frames: int) -> tuple[Floats, Floats]:
        """Mean chroma and mean place of each frame."""
        t_P = self.at_P3[:, 0]
        count_T = np.bincount(t_P, minlength=frames).astype(np.float64)
        sums = [
            np.bincount(t_P, values, minlength=frames)
            for values in (*self.chroma_P2.T, *self.at_P3[:, 1:].T)
        ]
        least = 0.2 * np.quantile(count_T, 0.9)
        seen_T = (count_T > least) & (count_T > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_4T = np.where(seen_T, np.stack(sums) / count_T, np.nan)
        return np.nan_to_num(mean_4T[:2].T), mean_4T[2:].T + 0.5


def _smooth(plane_THW: Floats) -> Floats:
    """Binomial mean of 3 × 3 pixels."""
    padded = np.pad(plane_THW, ((0, 0), (1, 1), (0, 0)), mode="edge")
    plane_THW = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    padded = np.pad(plane_THW, ((0, 0), (0, 0), (1, 1)), mode="edge")
    return (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 16


def _groups(
    at_P3: npt.NDArray[np.int64], chroma_P2: Floats, shape: tuple[int, ...]
) -> list[npt.NDArray[np.bool_]]:
    """Which coloured pixels belong to which thing."""
    frames, height, width = shape
    hue_P = (chroma_P2 @ _HUES_N2.T).argmax(1)
    cell_P = hue_P * frames + at_P3[:, 0]
    cells = len(_HUES_N2) * frames
    count_NT = np.bincount(cell_P, minlength=cells).reshape(-1, frames).astype(np.float64)
    most = float(np.quantile(count_NT.sum(0), 0.9))
    if most < _LEAST_AREA * height * width:
        return []
    total_N = count_NT.sum(1)
    order = np.argsort(-total_N)
    first = order[0]
    everything = np.ones(len(at_P3), dtype=bool)
    for second in order[1:]:
        if total_N[second] < _SECOND_SHARE * total_N[first]:
            break
        both_T = (count_NT[[first, second]] > 0.004 * height * width).all(0)
        if both_T.mean() < 0.5:
            continue
        places = [
            np.bincount(cell_P, at_P3[:, axis], minlength=cells).reshape(-1, frames)
            for axis in (1, 2)
        ]
        place_N2T = (
            np.stack(places, axis=1)[:, :, both_T] / np.maximum(count_NT, 1)[:, None, both_T]
        )
        apart_T = np.hypot(*(place_N2T[first] - place_N2T[second]))
        radii_T = np.sqrt(count_NT[[first, second]][:, both_T] / np.pi).sum(0)
        if np.median(apart_T / radii_T) > 1.0:
            nearer = chroma_P2 @ (_HUES_N2[first] - _HUES_N2[second]) > 0
            return [nearer, ~nearer]
    return [everything]


def _covers(found: list[_Pixels], u_THW: Floats, v_THW: Floats) -> list[Floats]:
    """The share of each pixel that each thing covers, by its chroma."""
    covers: list[Floats] = []
    for part in found:
        mean = part.chroma_P2.mean(0)
        scale = float(np.quantile(part.chroma_P2 @ (mean / np.hypot(*mean)), 0.75))
        chroma_T2, _ = part.per_frame(len(u_THW))
        seen_T1 = np.hypot(*chroma_T2.T)[:, None] > 0
        # Along each frame's own hue, so that a thing that changes colour keeps its outline.
        axis_T2 = np.where(seen_T1, chroma_T2, mean)
        axis_T2 /= np.hypot(*axis_T2.T)[:, None] * scale
        axis_T211 = axis_T2[..., None, None].astype(np.float32)
        covers.append(axis_T211[:, 0] * u_THW + axis_T211[:, 1] * v_THW)
    if len(found) == 2:
        first_THW, second_THW = (_beyond(part, u_THW.shape) for part in found)
        covers[0][second_THW < first_THW] = 0
        covers[1][first_THW < second_THW] = 0
    return covers


def _beyond(part: _Pixels, shape: tuple[int, ...]) -> Floats:
    """How far each pixel is beyond a thing's usual outline; infinite where it is not seen."""
    _, place_T2 = part.per_frame(shape[0])
    radius = np.sqrt(len(part.at_P3) / shape[0] / np.pi)
    y_TH1 = (np.arange(shape[1]) + 0.5 - place_T2[:, :1])[:, :, None]
    x_T1W = (np.arange(shape[2]) + 0.5 - place_T2[:, 1:])[:, None]
    return np.nan_to_num(np.hypot(y_TH1, x_T1W) - radius, nan=np.inf).astype(np.float32)
