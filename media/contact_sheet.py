"""Many frames as one picture to look at: strips of frames, each with a line above and its times.

    a heading, with a mark of colour before its first line
    lines of facts
    a strip: a line, then its frames from left to right, row by row, a label under each

Draws with Pillow. Knows nothing of where the frames come from.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from media.frames import Frames

Colour = tuple[int, int, int]
GREEN: Colour = (38, 140, 76)
AMBER: Colour = (214, 140, 16)
RED: Colour = (196, 52, 48)
_PAPER, _INK, _GREY = (250, 250, 248), (28, 30, 34), (112, 116, 122)
_WIDTH = 1200
_MARGIN, _GAP = 28, 8
_HEADING, _TEXT, _LABEL = 24, 15, 12
_SIDES = (110, 260)
"""Least and most pixels of the longer side of a frame as drawn."""


@dataclass(frozen=True)
class Strip:
    """Frames that belong together, all of one size."""

    line: str
    """What stands above them."""
    frames: Sequence[Frames]
    """Each uint8 [H, W, 3]."""
    labels: Sequence[str]
    """One for each frame."""


def contact_sheet(
    heading: str, lines: Sequence[str], strips: Sequence[Strip], mark: Colour = GREEN
) -> Frames:
    """A heading, lines and strips of frames as one picture, uint8 [H, 1200, 3].

    >>> strip = Strip("window 0", [np.zeros((32, 64, 3), np.uint8)] * 3, ["0.0", "0.1", "0.2"])
    >>> contact_sheet("a.mp4: kept", ["64×32, 3 frames"], [strip]).shape[1:]
    (1200, 3)
    """
    inside = _WIDTH - 2 * _MARGIN
    heads = _wrapped(heading, _font(_HEADING), inside - 28)
    texts = [part for line in lines for part in _wrapped(line, _font(_TEXT), inside)]
    grids = [_Grid.of(strip, inside) for strip in strips]
    height = 2 * _MARGIN + len(heads) * (_HEADING + 8) + len(texts) * (_TEXT + 7)
    height += sum(grid.height + 30 + _TEXT for grid in grids)
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN
    pen.ellipse((_MARGIN, top + 6, _MARGIN + 15, top + 21), fill=mark)
    for head in heads:
        pen.text((_MARGIN + 28, top), head, fill=_INK, font=_font(_HEADING))
        top += _HEADING + 8
    for text in texts:
        pen.text((_MARGIN, top + 4), text, fill=_GREY, font=_font(_TEXT))
        top += _TEXT + 7
    for strip, grid in zip(strips, grids, strict=True):
        pen.text((_MARGIN, top + 16), strip.line, fill=_INK, font=_font(_TEXT))
        top += 30 + _TEXT
        grid.draw(sheet, pen, strip, top)
        top += grid.height
    return np.asarray(sheet, dtype=np.uint8)


@dataclass(frozen=True)
class _Grid:
    """Where the frames of a strip go."""

    columns: int
    cell: tuple[int, int]
    """Width and height of a frame as drawn."""
    rows: int

    @classmethod
    def of(cls, strip: Strip, inside: int) -> _Grid:
        """As large as the room allows, the last row as full as may be."""
        rows, columns = strip.frames[0].shape[:2]
        count = len(strip.frames)
        narrowest = max(1, round(_SIDES[0] * min(1.0, columns / rows)))
        most = max(1, (inside + _GAP) // (narrowest + _GAP))
        # Two rows of nine look better than one of ten and one of seven.
        across = min(count, math.ceil(count / math.ceil(count / min(most, 9))))
        width = (inside - (across - 1) * _GAP) // across
        width = min(width, max(1, round(_SIDES[1] * min(1.0, columns / rows))))
        return cls(
            across, (width, max(1, round(width * rows / columns))), math.ceil(count / across)
        )

    @property
    def height(self) -> int:
        return self.rows * (self.cell[1] + _LABEL + 14)

    def draw(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, strip: Strip, top: int) -> None:
        """The frames and their labels, from `top` on."""
        width, height = self.cell
        for place, (frame, label) in enumerate(zip(strip.frames, strip.labels, strict=True)):
            row, column = divmod(place, self.columns)
            x, y = _MARGIN + column * (width + _GAP), top + row * (height + _LABEL + 14)
            # Small pictures are shown pixel by pixel; large ones are made smaller smoothly.
            grows = frame.shape[1] * 2 <= width
            how = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(frame).resize((width, height), how), (x, y))
            pen.text((x, y + height + 3), label, fill=_GREY, font=_font(_LABEL))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Pillow's own font has no é and no ×."""
    package = importlib.util.find_spec("matplotlib")  # finds, and does not import
    assert package is not None
    assert package.origin is not None
    fonts = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text in lines that fit; a word that does not fit is cut."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            lines, word = [*lines, word[:fits]], word[fits:]
        lines.append(word)
    return [line for line in lines if line] or [""]
