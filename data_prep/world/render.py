"""A scene becomes pixels, at any size and frame rate.

A picture is a pure function of scene, time and size. Between machines the last bit of a sine or of
a sum may differ; rounding to 0..255 forgives that except where a value lies that near to a half, so
two machines may disagree by one level in a pixel of millions.

Shapes: T frames, H, W rows and columns in pixels, C colours; h, w those of a thing's own box.
Knows nothing of captions or files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_prep.world.background import Background, background_of
from data_prep.world.mechanics import View, frame_times, in_picture, view
from data_prep.world.scene import Occluder, Scene, Thing
from data_prep.world.vocabulary import COLOURS
from media.frames import Frames

Floats = npt.NDArray[np.float64]
Box = tuple[slice, slice]

BAR_TONES = {"dark": 0.48, "grey": 0.75, "light": 0.4}
"""Brightness of an occluder's bar over each tone of background, 0..1."""


def render_clip(
    scene: Scene, num_frames: int, fps: float, height: int = 64, width: int = 64
) -> Frames:
    """Frames of a scene as uint8 [T, H, W, 3], the middle of the clip at time 0.

    >>> from data_prep.world.draw import random_scene
    >>> render_clip(random_scene(0), 5, 8.0).shape
    (5, 64, 64, 3)
    """
    side = min(height, width)
    times_T = frame_times(num_frames, fps)
    seen = view(scene, times_T)
    places_NT2 = in_picture(scene, times_T, (height / side / 2, width / side / 2))
    # Pixel i has its middle at i + 0.5; a place is counted from the middle of the picture.
    centres_NT2 = places_NT2 * side + np.array([height, width]) / 2
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    background = background_of(scene)
    still = scene.camera == "static"
    if still:
        frames[:] = _rounded(_behind(background, seen, 0, height, width))
    for t in range(num_frames):
        if not still:
            frames[t] = _rounded(_behind(background, seen, t, height, width))
        for thing, centre_T2 in zip(scene.things, centres_NT2, strict=True):
            radius = thing.radius * side * seen.scale_T[t]
            _draw_thing(frames[t], thing, centre_T2[t], radius)
        if scene.occluder is not None:
            _draw_bar(frames[t], scene.occluder, round(255 * BAR_TONES[scene.tone]))
    return frames


def render_image(scene: Scene, height: int = 64, width: int = 64) -> Frames:
    """The scene in the middle of its clip, uint8 [H, W, 3]."""
    return render_clip(scene, 1, 1.0, height, width)[0]


def _rounded(values: Floats) -> Frames:
    """The nearest levels of values in 0..255."""
    return (values + 0.5).astype(np.uint8)


def _behind(background: Background, seen: View, t: int, height: int, width: int) -> Floats:
    """The background as the camera sees it in frame `t`, [H, W, 3] on the scale 0..255."""
    side, scale, centre_2 = min(height, width), seen.scale_T[t], seen.centre_T2[t]
    rows_H = (np.arange(height) + 0.5 - height / 2) / side / scale + centre_2[0]
    columns_W = (np.arange(width) + 0.5 - width / 2) / side / scale + centre_2[1]
    return background.picture(rows_H, columns_W)


def _draw_thing(frame_HWC: Frames, thing: Thing, centre_2: Floats, radius: float) -> None:
    """Lay a thing over a frame; its edges are one pixel soft."""
    reach = 1.25 * radius + 1
    box = _box(frame_HWC, centre_2 - reach, centre_2 + reach)
    y_h1 = np.arange(box[0].start, box[0].stop)[:, None] + (0.5 - centre_2[0])
    x_w = np.arange(box[1].start, box[1].stop) + (0.5 - centre_2[1])
    cover_hw = np.clip(depth(thing.shape, y_h1, x_w, radius) + 0.5, 0, 1)
    _lay(frame_HWC[box], np.array(COLOURS[thing.colour], dtype=np.float64), cover_hw)


def _draw_bar(frame_HWC: Frames, bar: Occluder, level: int) -> None:
    """Lay a bar over a frame."""
    size = frame_HWC.shape[:2]
    side, axis = min(size), bar.axis
    off = np.arange(size[axis]) + 0.5 - size[axis] / 2 - bar.centre * side
    cover = np.clip(bar.half_width * side - np.abs(off) + 0.5, 0, 1)
    cover_HW = np.broadcast_to(cover[:, None] if axis == 0 else cover, size)
    _lay(frame_HWC, np.full(3, float(level)), cover_HW)


def _lay(part_hwC: Frames, colour_C: Floats, cover_hw: Floats) -> None:
    """Mix a colour into a part of a frame, in place, by how much it covers each pixel."""
    cover_hw1 = cover_hw[..., None]
    part_hwC[:] = _rounded(part_hwC * (1 - cover_hw1) + colour_C * cover_hw1)


def _box(frame_HWC: Frames, low_2: Floats, high_2: Floats) -> Box:
    """The rows and columns of a frame between two corners; empty outside."""
    height, width = frame_HWC.shape[:2]
    first = np.floor(low_2).astype(int).clip(0, (height, width))
    last = np.ceil(high_2).astype(int).clip(0, (height, width))
    return slice(first[0], last[0]), slice(first[1], last[1])


def depth(shape: str, y: Floats, x: Floats, radius: float) -> Floats:
    """How far inside a shape's outline a point lies, in the unit of `radius`; below 0 outside.

    Args:
        shape: its name.
        y, x: (down, right) from the middle of the shape's box; they broadcast.
        radius: the thing's radius; `EXTENTS` has how far each shape goes beyond it.
    """
    if shape == "circle":
        return radius - np.hypot(y, x)
    down, right = np.abs(y), np.abs(x)
    if shape == "square":
        return 0.886 * radius - np.maximum(down, right)
    if shape == "triangle":
        # Equilateral, upright, 2.4 radii wide: the base, and the slopes that mirror each other.
        half_height = 0.6 * np.sqrt(3) * radius
        slopes = 0.5 * (y + half_height) - np.sqrt(3) / 2 * right
        return np.minimum(half_height - y, slopes)
    if shape == "cross":
        arm, breadth = 1.08 * radius, 0.36 * radius
        upright = np.minimum(arm - down, breadth - right)
        return np.maximum(upright, np.minimum(breadth - down, arm - right))
    assert shape == "ring"
    distance = np.hypot(y, x)
    return np.minimum(1.06 * radius - distance, distance - 0.56 * radius)
