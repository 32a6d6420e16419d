"""How a frame is cut to its bucket: the nearest aspect, black bars measured and cut, the resize.

Pure functions of pixels and sizes. Knows nothing of decoders, Ray or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from media.frames import Frames


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


def enlargement(height: int, width: int, to_height: int, to_width: int) -> float:
    """How many times longer a source's pixels are in the target, by the box of `crop_box`.

    >>> enlargement(360, 640, 480, 848), enlargement(720, 1280, 360, 640)
    (1.3333333333333333, 0.5)
    """
    return max(to_height / height, to_width / width)


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
