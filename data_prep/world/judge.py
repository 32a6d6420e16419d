"""A video is read: colour, shape, size, motion and camera from its pixels alone.

Made for the synthetic world, for what a codec leaves of it and for what a model generates of it,
which is soft, noisy and may be no thing at all. Where frames do not agree, or two words fit about
as well, the word is None: not sure.

    judge_matte.py    where the coloured things are
    judge_shape.py    their outlines, against templates
    judge_ground.py   the background, and a bar before the things
    judge_camera.py   the background's way
    judge_motion.py   the things' ways

Shapes: T frames, H, W rows and columns; places are (down, right). Knows nothing of scenes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.world.judge_camera import Camera, read_camera
from data_prep.world.judge_ground import Bar, Ground, read_ground
from data_prep.world.judge_matte import Matte, mattes, name_hue
from data_prep.world.judge_motion import read_motion
from data_prep.world.judge_shape import CENTROIDS, MEAN_AREA, crops, read_outline
from data_prep.world.vocabulary import COLOURS, EXTENTS, SIZES
from media.frames import Frames

Floats = npt.NDArray[np.floating]

SURE = 0.5
"""Least confidence of what is said."""
_MARGIN = 4
"""Pixels around a coloured one that are not taken for background."""
_SIDE = 64
"""Frames are judged at this many pixels of the smaller side, up to twice as many."""


@dataclass(frozen=True)
class Reading:
    """What is said of one thing and of the camera; None where it is not sure, or nothing is there.

    Lengths are fractions of the picture's smaller side, places are from its middle.
    """

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    motion: str | None = None
    """Relative to the world, whatever the camera does."""
    camera: str | None = None
    speed: str | None = None
    """slowly or quickly; empty for what is still."""
    tone: str | None = None
    """Of the background."""
    colour_confidence: float = 0.0
    """0 to 1, as those that follow; a word is said from 0.5."""
    shape_confidence: float = 0.0
    size_confidence: float = 0.0
    motion_confidence: float = 0.0
    camera_confidence: float = 0.0
    radius: float = float("nan")
    """In the middle of the video."""
    track_T2: Floats | None = None
    """The middle of the thing's box in each picture, NaN where it is hidden or cannot be told."""
    world_T2: Floats | None = None
    """The same without what the camera does."""
    area_T: Floats | None = None
    """How much of the thing is seen in each frame, about 0 to 1."""


def judge(frames: Frames, *, fps: float = 16.0) -> Reading:
    """Read the most prominent thing of a video, and the camera.

    Args:
        frames: uint8 [T, H, W, 3] of any size.
        fps: frames per second.

    >>> from data_prep.world.draw import random_scene
    >>> from data_prep.world.render import render_clip
    >>> scene = random_scene(1, colour="red", motion="left", camera="static")
    >>> reading = judge(render_clip(scene, 17, 8.0), fps=8.0)
    >>> reading.colour, reading.motion, reading.camera
    ('red', 'left', 'static')
    """
    return judge_things(frames, fps=fps)[0]


def judge_things(frames: Frames, *, fps: float = 16.0) -> list[Reading]:
    """Readings of the things of a video, the most prominent first; one at least, two at most.

    Where there is nothing coloured, the only reading tells of the camera.
    """
    frames = reduced(frames)
    found = mattes(frames)
    near_THW = _near(found, frames.shape[:3])
    ground = read_ground(frames, near_THW)
    camera = read_camera(frames, near_THW, fps) if len(frames) > 2 else None
    about = _About(ground, camera, fps)
    if found:
        meets = len(found) > 1
        return [_reading(_Seen.of(matte, about), about, meets) for matte in found]
    word, sure = about.camera_said
    return [Reading(camera=word, tone=ground.tone, camera_confidence=sure)]


@dataclass(frozen=True)
class _About:
    """What is said of the video beside its things."""

    ground: Ground
    camera: Camera | None
    fps: float

    @property
    def camera_said(self) -> tuple[str | None, float]:
        """The camera's word, if it is sure, and how sure it is."""
        if self.camera is None:
            return None, 0.0
        return _said(self.camera.word, self.camera.confidence), self.camera.confidence

    def times(self, frames: int) -> Floats:
        """Seconds of each frame, around 0."""
        return (np.arange(frames) - (frames - 1) / 2) / self.fps

    def growth(self, frames: int) -> Floats:
        """How the camera's zoom enlarges each frame."""
        return np.asarray(np.exp((self.camera.zoom if self.camera else 0.0) * self.times(frames)))


def reduced(frames: Frames) -> Frames:
    """Large frames shrunk by a whole factor: what is judged is coarser than their pixels."""
    factor = min(frames.shape[1:3]) // _SIDE
    if factor < 2:
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).reduce(factor)) for frame in frames])


def _near(found: list[Matte], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Pixels of the things, and those around them that blur and codecs colour."""
    near_THW = np.zeros(shape, dtype=bool)
    for matte in found:
        near_THW |= matte.strong_THW
    for axis in (1, 2):
        wide_THW = near_THW.copy()
        for step in range(1, _MARGIN + 1):
            ahead, behind = [slice(None)] * 3, [slice(None)] * 3
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            wide_THW[tuple(ahead)] |= near_THW[tuple(behind)]
            wide_THW[tuple(behind)] |= near_THW[tuple(ahead)]
        near_THW = wide_THW
    return near_THW


def _said(word: str | None, confidence: float) -> str | None:
    return word if confidence >= SURE else None


@dataclass(frozen=True)
class _Seen:
    """One thing, followed through the frames; pixels."""

    matte: Matte
    place_T2: Floats
    """Centroids."""
    radius_T: Floats
    area_T: Floats
    """Seen area, in shares of what the thing has."""
    together_T: Floats
    """Share of the coloured area that is at the thing's place."""
    clipped_T: npt.NDArray[np.bool_]
    covered_T: npt.NDArray[np.bool_]
    """A bar may hide some of it."""

    @classmethod
    def of(cls, matte: Matte, about: _About) -> _Seen:
        """Follow a thing: its place from the pixels around its place, its radius from its area."""
        # Half covers stay half: blurred edges keep their area, noise below goes.
        cover_THW = np.clip((matte.cover_THW - 0.2) / 0.6, 0, 1)
        place_T2 = matte.place_T2
        total_T = cover_THW.sum((1, 2))
        radius = np.sqrt(max(float(np.quantile(total_T, 0.8)), 1.0) / MEAN_AREA)
        for _ in range(3):
            window_TH, window_TW = _windows(place_T2, 1.8 * radius, cover_THW.shape[1:])
            area_T, place_T2 = _moments(cover_THW, window_TH, window_TW)
        edges = [cover_THW[:, [0, -1]].max((1, 2)), cover_THW[:, :, [0, -1]].max((1, 2))]
        clipped_T = np.maximum(*edges) > 0.6
        growth_T = about.growth(len(area_T))
        covered_T = _covered(place_T2, 1.3 * radius * growth_T + 1, about.ground.bar)
        usual = _usual(area_T / growth_T**2, ~clipped_T & ~covered_T)
        with np.errstate(invalid="ignore", divide="ignore"):
            together_T = np.where(total_T > 0, area_T / total_T, 0.0)
        radius_T = growth_T * np.sqrt(usual / MEAN_AREA)
        share_T = area_T / (growth_T**2 * usual)
        return cls(matte, place_T2, radius_T, share_T, together_T, clipped_T, covered_T)

    @property
    def free_T(self) -> npt.NDArray[np.bool_]:
        """Frames in which it is seen, away from edges and bar."""
        return (self.area_T > 0.4) & ~self.clipped_T & ~self.covered_T


def _covered(place_T2: Floats, reach_T: Floats, bar: Bar | None) -> npt.NDArray[np.bool_]:
    """Frames in which the bar may hide some of a thing; where it is not seen, all of it."""
    if bar is None:
        return np.zeros(len(place_T2), dtype=bool)
    at_T = place_T2[:, bar.axis]
    beside_T = (at_T + reach_T < bar.low) | (at_T - reach_T > bar.high)
    return np.asarray(~beside_T)


def _windows(place_T2: Floats, half: float, size: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Rows [T, H] and columns [T, W] near a place; none where it is NaN."""
    parts = []
    for axis in range(2):
        off = np.abs(np.arange(size[axis]) + 0.5 - place_T2[:, axis : axis + 1])
        parts.append((off < half).astype(np.float32))
    return parts[0], parts[1]


def _moments(cover_THW: Floats, window_TH: Floats, window_TW: Floats) -> tuple[Floats, Floats]:
    """Area [T] and centroid [T, 2] of the cover inside windows."""
    in_rows_TH = window_TH * np.einsum("thw,tw->th", cover_THW, window_TW)
    in_columns_TW = window_TW * np.einsum("thw,th->tw", cover_THW, window_TH)
    area_T = in_rows_TH.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows_T = in_rows_TH @ (np.arange(cover_THW.shape[1]) + 0.5) / area_T
        columns_T = in_columns_TW @ (np.arange(cover_THW.shape[2]) + 0.5) / area_T
    return area_T.astype(np.float64), np.stack([rows_T, columns_T], 1).astype(np.float64)


def _usual(area_T: Floats, free_T: npt.NDArray[np.bool_]) -> float:
    """The area of the thing when it is whole: an upper quantile, since edges and bars take away."""
    seen_T = area_T[free_T & (area_T > 0)]
    if not len(seen_T):
        return max(float(area_T.max()), 1.0)
    most = float(np.quantile(seen_T, 0.85))
    return max(float(np.median(seen_T[np.abs(seen_T - most) <= 0.15 * most])), 1.0)


def _reading(seen: _Seen, about: _About, meets: bool) -> Reading:
    """Words for one thing."""
    colour, colour_sure = _colour(seen.matte)
    cover_THW = np.clip(seen.matte.cover_THW, -0.2, 1.0)
    free_T = seen.free_T
    if not free_T.any():
        free_T = seen.area_T > 0.8
    place_T2 = np.nan_to_num(seen.place_T2)
    outline = read_outline(
        crops(cover_THW, place_T2, seen.radius_T), free_T * seen.together_T.clip(0.01)
    )
    side = min(cover_THW.shape[1:])
    half_2 = np.array(cover_THW.shape[1:]) / side / 2
    shape = outline.shape if outline else "circle"
    radius_T = seen.radius_T * (outline.ratio if outline else 1.0) / side
    radius = float(np.median(radius_T))
    below_T2 = np.stack([CENTROIDS.get(shape, 0.0) * radius_T, 0 * radius_T], 1)
    track_T2 = seen.place_T2 / side - half_2 - below_T2
    # What vanishes without a bar to hide it is no thing of the world.
    there = _ramp(float(((seen.area_T > 0.4) | seen.covered_T).mean()), 0.4, 0.8)
    one = _ramp(float(np.median(seen.together_T)), 0.6, 0.9)
    steady = _ramp(_spread(seen.area_T[free_T]), 0.9, 0.4)
    trust_T = np.clip((seen.area_T - 0.6) / 0.3, 0, 1) * np.clip(2 * seen.together_T - 1, 0, 1)
    trust_T = trust_T * np.where(seen.clipped_T, 0.3, 1.0)
    world_T2 = _in_world(track_T2, about)
    room_2 = half_2 - radius * np.array(EXTENTS[shape])
    motion = read_motion(world_T2, trust_T, about.fps, room_2, meets=meets)
    size, size_sure = _size(radius)
    shape_sure = min(outline.confidence if outline else 0.0, there, one)
    size_sure = min(size_sure, there, one, steady)
    motion_sure = min(motion.confidence if motion else 0.0, there)
    camera, camera_sure = about.camera_said
    return Reading(
        colour=_said(colour, min(colour_sure, there)),
        shape=_said(shape, shape_sure),
        size=_said(size, size_sure),
        motion=_said(motion.word if motion else None, motion_sure),
        camera=camera,
        speed=_said(motion.speed if motion else None, motion_sure),
        tone=about.ground.tone,
        colour_confidence=min(colour_sure, there),
        shape_confidence=shape_sure,
        size_confidence=size_sure,
        motion_confidence=motion_sure,
        camera_confidence=camera_sure,
        radius=radius,
        track_T2=np.where((trust_T > 0)[:, None], track_T2, np.nan),
        world_T2=np.where((trust_T > 0)[:, None], world_T2, np.nan),
        area_T=seen.area_T,
    )


def _ramp(value: float, none: float, full: float) -> float:
    """0 at one value, 1 at the other, straight between them."""
    return float(np.clip((value - none) / (full - none), 0, 1))


def _spread(area_T: Floats) -> float:
    """Range of the middle 80% of the areas, as a share of their median."""
    low, middle, high = np.quantile(area_T, [0.1, 0.5, 0.9]) if len(area_T) else (0.0, 1.0, 1.0)
    return float((high - low) / middle)


def _in_world(track_T2: Floats, about: _About) -> Floats:
    """Places in the world: the view of `mechanics.view`, undone."""
    if about.camera is None:
        return track_T2
    frames = len(track_T2)
    world_T2 = track_T2 / about.growth(frames)[:, None]
    world_T2[:, 1] += about.camera.pan * about.times(frames)
    return world_T2


def _colour(matte: Matte) -> tuple[str, float]:
    """The colour that the frames agree on."""
    seen_T2 = matte.chroma_T2[np.hypot(*matte.chroma_T2.T) > 0]
    named = [name_hue(chroma_2) for chroma_2 in seen_T2]
    votes = dict.fromkeys(COLOURS, 0.0)
    for colour, _ in named:
        votes[colour] += 1 / len(named)
    best = max(votes, key=lambda colour: votes[colour])
    _, margin = name_hue(seen_T2.mean(0))
    agree = float(np.clip(3 * votes[best] - 1.75, 0, 1))
    return best, min(agree, margin / 0.4, _ramp(matte.purity, 0.55, 0.75))


def _size(radius: float) -> tuple[str, float]:
    """The nearest size by ratio, and how sure: 0 midway between two."""
    off = {size: abs(float(np.log(radius / usual))) for size, usual in SIZES.items()}
    best, second = sorted(off, key=lambda size: off[size])[:2]
    sure = min(1.0, (off[second] - off[best]) / 0.1)
    # Far from every size is none.
    return best, sure * float(np.clip(2 - off[best] / 0.2, 0, 1))
