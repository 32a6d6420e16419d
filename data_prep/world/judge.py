"""A video is read: colour, shape, size, motion and camera from its pixels alone.

Made for the synthetic world, for what a codec leaves of it and for what a model generates of it,
which is soft, noisy and may be no thing at all. Where frames do not agree, or two words fit about
as well, the word is None: not sure.

    judge_matte.py    where the coloured things are
    judge_shape.py    their outlines, against templates
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
from data_prep.world.judge_matte import Matte, mattes, name_hue
from data_prep.world.judge_motion import read_motion
from data_prep.world.judge_shape import CENTROIDS, MEAN_AREA, crops, read_outline
from data_prep.world.vocabulary import COLOURS, EXTENTS, SIZES, TONES
from media.frames import Frames

Floats = npt.NDArray[np.floating]

SURE = 0.5
"""Least confidence of what is said."""
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
        frames: uint8 [T, H, W, 3] of any size; about two seconds, as the world's clips are.
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
    near_THW = np.zeros(frames.shape[:3], dtype=bool)
    for matte in found:
        near_THW |= _widened(matte.cover_THW > 0.12, 3)
    camera = read_camera(frames, near_THW, fps) if len(frames) > 2 else None
    tone = _tone(frames, near_THW)
    seen = [_Seen.of(matte, camera, fps) for matte in found]
    readings = [_reading(part, camera, tone, fps) for part in seen]
    if readings:
        return readings
    sure = camera.confidence if camera else 0.0
    return [
        Reading(
            camera=_said(camera.word if camera else None, sure), tone=tone, camera_confidence=sure
        )
    ]


def reduced(frames: Frames) -> Frames:
    """Large frames shrunk by a whole factor: what is judged is coarser than their pixels."""
    factor = min(frames.shape[1:3]) // _SIDE
    if factor < 2:
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).reduce(factor)) for frame in frames])


def _widened(mask_THW: npt.NDArray[np.bool_], by: int) -> npt.NDArray[np.bool_]:
    """The mask and all within so many pixels of it, along rows and columns."""
    for axis in (1, 2):
        wide = mask_THW.copy()
        for step in range(1, by + 1):
            ahead = [slice(None)] * 3
            behind = [slice(None)] * 3
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            wide[tuple(ahead)] |= mask_THW[tuple(behind)]
            wide[tuple(behind)] |= mask_THW[tuple(ahead)]
        mask_THW = wide
    return mask_THW


def _tone(frames: Frames, near_THW: npt.NDArray[np.bool_]) -> str:
    """The tone nearest to the background's brightness."""
    rest = frames[~near_THW]
    level = float(np.median(rest.mean(-1) if len(rest) else frames)) / 255
    return min(TONES, key=lambda tone: abs(TONES[tone] - level))


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

    @classmethod
    def of(cls, matte: Matte, camera: Camera | None, fps: float) -> _Seen:
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
        growth_T = _growth(area_T, clipped_T, camera, fps)
        usual = _usual(area_T / growth_T**2, clipped_T)
        radius_T = growth_T * np.sqrt(usual / MEAN_AREA)
        with np.errstate(invalid="ignore", divide="ignore"):
            together_T = np.where(total_T > 0, area_T / total_T, 0.0)
        return cls(matte, place_T2, radius_T, area_T / (growth_T**2 * usual), together_T, clipped_T)

    @property
    def whole_T(self) -> Floats:
        """1 for frames in which all of the thing is seen, and nothing else of its colour."""
        right = (np.abs(self.area_T - 1) < 0.12) & (self.together_T > 0.85) & ~self.clipped_T
        return right.astype(np.float32)


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


def _growth(
    area_T: Floats, clipped_T: npt.NDArray[np.bool_], camera: Camera | None, fps: float
) -> Floats:
    """How the thing's radius changes: with the camera's zoom, or not at all."""
    time_T = (np.arange(len(area_T)) - (len(area_T) - 1) / 2) / fps
    return np.asarray(np.exp((camera.zoom if camera else 0.0) * time_T))


def _usual(area_T: Floats, clipped_T: npt.NDArray[np.bool_]) -> float:
    """The area of the thing when it is whole: an upper quantile, since bars and edges take away."""
    free_T = area_T[~clipped_T] if (~clipped_T).sum() >= 3 else area_T
    most = float(np.quantile(free_T, 0.85))
    near = free_T[np.abs(free_T - most) < 0.15 * most]
    return float(np.median(near)) if len(near) and most > 0 else max(most, 1.0)


def _reading(seen: _Seen, camera: Camera | None, tone: str, fps: float) -> Reading:
    """Words for one thing."""
    colour, colour_sure = _colour(seen.matte)
    cover_THW, whole_T = seen.matte.cover_THW, seen.whole_T
    if whole_T.sum() < 2:
        whole_T = np.clip(1 - 3 * np.abs(seen.area_T - 1), 0, 1)
    outline = read_outline(crops(cover_THW, np.nan_to_num(seen.place_T2), seen.radius_T), whole_T)
    side = min(cover_THW.shape[1:])
    half_2 = np.array(cover_THW.shape[1:]) / side / 2
    shape = outline.shape if outline else "circle"
    radius_T = seen.radius_T * (outline.ratio if outline else 1.0) / side
    radius = float(np.median(radius_T))
    below = np.stack([CENTROIDS.get(shape, 0.0) * radius_T, 0 * radius_T], 1)
    track_T2 = seen.place_T2 / side - half_2 - below
    shape_sure = outline.confidence if outline else 0.0
    size, size_sure = _size(radius)
    size_sure *= min(1.0, float((seen.area_T > 0.3).mean()) / 0.5)
    trust_T = np.clip((seen.area_T - 0.6) / 0.3, 0, 1) * np.clip(2 * seen.together_T - 1, 0, 1)
    trust_T = trust_T * np.where(seen.clipped_T, 0.3, 1.0)
    world_T2 = _in_world(track_T2, camera, fps)
    room_2 = half_2 - radius * np.array(EXTENTS[shape])
    motion = read_motion(world_T2, trust_T, fps, room_2) if len(track_T2) > 2 else None
    camera_sure = camera.confidence if camera else 0.0
    motion_sure = motion.confidence if motion else 0.0
    return Reading(
        colour=_said(colour, colour_sure),
        shape=_said(shape, shape_sure),
        size=_said(size, size_sure),
        motion=_said(motion.word if motion else None, motion_sure),
        camera=_said(camera.word if camera else None, camera_sure),
        speed=_said(motion.speed if motion else None, motion_sure),
        tone=tone,
        colour_confidence=colour_sure,
        shape_confidence=shape_sure,
        size_confidence=size_sure,
        motion_confidence=motion_sure,
        camera_confidence=camera_sure,
        radius=radius,
        track_T2=np.where((trust_T > 0)[:, None], track_T2, np.nan),
        world_T2=np.where((trust_T > 0)[:, None], world_T2, np.nan),
        area_T=seen.area_T,
    )


def _in_world(track_T2: Floats, camera: Camera | None, fps: float) -> Floats:
    """Places in the world: the view of `mechanics.view`, undone."""
    if camera is None:
        return track_T2
    time_T = (np.arange(len(track_T2)) - (len(track_T2) - 1) / 2) / fps
    world_T2 = track_T2 / np.exp(camera.zoom * time_T)[:, None]
    world_T2[:, 1] += camera.pan * time_T
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
    return best, agree * min(1.0, margin / 0.4)


def _size(radius: float) -> tuple[str, float]:
    """The nearest size by ratio, and how sure: 0 midway between two."""
    off = {size: abs(float(np.log(radius / usual))) for size, usual in SIZES.items()}
    best, second = sorted(off, key=lambda size: off[size])[:2]
    sure = min(1.0, (off[second] - off[best]) / 0.1)
    # Far from every size is none.
    return best, sure * float(np.clip(2 - off[best] / 0.2, 0, 1))
