"""From a video to a clip: which frames, and how each is cut to the bucket.

Windows of frames, buckets by aspect, black bars measured and cut. Pure functions of timestamps,
pixels, seed and key. Knows nothing of decoders, Ray or files.

    ClipTooShort(FlowreelError, ValueError)   too_short: the source ends before the window does
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from flowreel.errors import FlowreelError
from media.frames import Frames


class ClipTooShort(FlowreelError, ValueError):
    """The source is shorter than the window of frames."""

    reason = "too_short"


def unit_hash(seed: int, key: str) -> float:
    """A number in [0, 1) from (seed, key) alone.

    >>> unit_hash(0, "a") == unit_hash(0, "a") != unit_hash(1, "a")
    True
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_window(
    pts_s: npt.NDArray[np.float64], num_frames: int, fps: float, *, seed: int, key: str
) -> list[int]:
    """Indices of the frames of one window: `num_frames` of them at `fps`, by real timestamps.

    The window starts at a frame chosen by hash(seed, key). Each target time takes the source frame
    nearest to it, so that a source of a lower rate repeats frames and one of a higher rate skips
    some.

    >>> choose_window(np.arange(20) / 16, 5, 8.0, seed=0, key="a")
    [6, 8, 10, 12, 14]

    Args:
        pts_s: [N] presentation times, seconds, not falling.
        num_frames: frames wanted.
        fps: target rate, frames per second.
        seed: the run's seed.
        key: the sample's key.

    Raises:
        ClipTooShort: the last target time lies more than half a target step past the last frame.
    """
    window_s = (num_frames - 1) / fps
    room_s = float(pts_s[-1]) - window_s if len(pts_s) else -window_s
    if not len(pts_s) or room_s < -0.5 / fps:
        have_s = float(pts_s[-1]) if len(pts_s) else 0.0
        raise ClipTooShort(
            f"the video's last frame is at {have_s:.3f} s; {num_frames} frames at {fps:g} fps "
            f"need one at {window_s:.3f} s"
        )
    return _window_from(pts_s, unit_hash(seed, key) * max(0.0, room_s), num_frames, fps)


def choose_windows(
    pts_s: npt.NDArray[np.float64],
    num_frames: int,
    fps: float,
    *,
    seed: int,
    key: str,
    at_most: int = 1,
) -> list[list[int]]:
    """Frame indices of up to `at_most` windows that do not overlap, in order of time.

    There are as many as fit, each of `num_frames` at `fps` as in `choose_window`. The time left
    over is shared out between them by hash(seed, key, number). A single window is exactly that of
    `choose_window`.

    >>> choose_windows(np.arange(40) / 16, 5, 8.0, seed=0, key="a", at_most=2)
    [[4, 6, 8, 10, 12], [15, 17, 19, 21, 23]]

    Raises:
        ClipTooShort: not even one fits.
    """
    whole_s = num_frames / fps
    room_s = float(pts_s[-1]) - (num_frames - 1) / fps if len(pts_s) else 0.0
    count = min(at_most, 1 + int(max(0.0, room_s) / whole_s + 1e-9))
    if count <= 1:
        return [choose_window(pts_s, num_frames, fps, seed=seed, key=key)]
    slack_s = max(0.0, room_s - (count - 1) * whole_s)
    places = sorted(unit_hash(seed, f"{key}:{number}") for number in range(count))
    windows: list[list[int]] = []
    for number, place in enumerate(places):
        wanted_s = place * slack_s + number * whole_s
        # In a source of few frames the last frame of a window may be the first of the next.
        earliest_s = float(pts_s[windows[-1][-1]]) if windows else 0.0
        windows.append(_window_from(pts_s, max(wanted_s, earliest_s), num_frames, fps))
    return windows


def _window_from(
    pts_s: npt.NDArray[np.float64], wanted_s: float, num_frames: int, fps: float
) -> list[int]:
    """The window from the last frame at or before `wanted_s`."""
    if len(pts_s) == 1:
        return [0] * num_frames
    # A start on a source frame keeps the steps even wherever one rate divides the other.
    start_s = float(pts_s[np.searchsorted(pts_s, wanted_s, side="right") - 1])
    targets_s = start_s + np.arange(num_frames) / fps
    after = np.clip(np.searchsorted(pts_s, targets_s, side="left"), 1, max(1, len(pts_s) - 1))
    before_is_nearer = targets_s - pts_s[after - 1] <= pts_s[after] - targets_s
    return [int(i) for i in after - before_is_nearer]


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (rows, columns) whose aspect is nearest to that of a source; the first of equals.

    >>> nearest_size(360, 640, [(64, 64), (48, 80), (80, 48)])
    (48, 80)
    """
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


class Bars(NamedTuple):
    """Rows and columns, in source pixels, that black bars take at each side.

    >>> Bars(top=12, bottom=12).size_inside(72, 128)
    (48, 128)
    """

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def cut(self, frame_HW3: Frames) -> Frames:
        """The picture between the bars (a view)."""
        height, width = frame_HW3.shape[:2]
        return frame_HW3[self.top : height - self.bottom, self.left : width - self.right]

    def size_inside(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the picture in a source of this size."""
        return height - self.top - self.bottom, width - self.left - self.right


class BarMeter:
    """Measures the black bars that all frames of a video share, frame by frame.

    A row or column belongs to a bar if nearly all of it is dark in every frame, from the edge on.
    Bars count only where they have about the same width at opposite sides (a night sky is none) and
    take at least a fiftieth of the side. A video that is dark throughout has no bars.

    >>> meter = BarMeter()
    >>> meter.add(np.pad(np.full((8, 16, 3), 200, np.uint8), ((4, 4), (0, 0), (0, 0))))
    >>> meter.bars()
    Bars(top=4, bottom=4, left=0, right=0)
    """

    DARK = 24
    """Grey level up to which a pixel counts as black: video black with compression noise."""
    STRAY = 0.01
    """Share of brighter pixels that a line of a bar may hold."""

    def __init__(self) -> None:
        self._rows: npt.NDArray[np.bool_] | None = None
        self._columns: npt.NDArray[np.bool_] | None = None
        self._size: tuple[int, int] | None = None
        self._mixed = False

    def add(self, frame_HW3: Frames) -> None:
        """Take one frame; a stream that changes its size on the way has no bars."""
        grey_HW = np.maximum(np.maximum(frame_HW3[..., 0], frame_HW3[..., 1]), frame_HW3[..., 2])
        bright_HW = grey_HW > self.DARK
        height, width = bright_HW.shape
        rows = bright_HW.sum(1) > self.STRAY * width
        # Bars above and below do not count for the columns, nor the other way round.
        columns = bright_HW.sum(0) > self.STRAY * height
        if self._size not in (None, (height, width)):
            self._mixed = True
            return
        self._size = (height, width)
        self._rows = rows if self._rows is None else self._rows | rows
        self._columns = columns if self._columns is None else self._columns | columns

    def bars(self) -> Bars:
        """What was measured, in pixels; zeros where there are none."""
        if self._rows is None or self._columns is None or self._mixed:
            return Bars()
        if not (self._rows.any() and self._columns.any()):
            return Bars()
        return Bars(*_pair(self._rows), *_pair(self._columns))


def _pair(lines: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Dark lines before and after the bright ones, where they are a pair of bars."""
    bright = np.flatnonzero(lines)
    before, after = int(bright[0]), int(len(lines) - 1 - bright[-1])
    least = max(2, len(lines) // 50)
    if min(before, after) < least or abs(before - after) > least:
        return 0, 0
    return before, after


def crop_box(
    height: int, width: int, to_height: int, to_width: int
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred box with the target's aspect, in pixels.

    >>> crop_box(360, 640, 64, 64)
    (140.0, 0.0, 500.0, 360.0)
    """
    scale = min(height / to_height, width / to_width)
    box_height, box_width = to_height * scale, to_width * scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height


def fit_frame(frame_HW3: Frames, to_height: int, to_width: int) -> Frames:
    """Centre crop to the target's aspect, then resize: uint8 [to_height, to_width, 3]."""
    height, width = frame_HW3.shape[:2]
    if (height, width) == (to_height, to_width):
        return frame_HW3
    box = crop_box(height, width, to_height, to_width)
    # Pillow widens the bilinear filter when it shrinks a picture: that is the antialiasing.
    picture = Image.fromarray(frame_HW3).resize(
        (to_width, to_height), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(picture, dtype=np.uint8)
