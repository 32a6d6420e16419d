"""A contact sheet shows every frame, whatever its shape, and keeps its words inside."""

from __future__ import annotations

import numpy as np
import pytest

from media.contact_sheet import RED, Strip, contact_sheet

PAPER = (250, 250, 248)


def flat(height: int, width: int, count: int) -> list[np.ndarray]:
    """Frames of one colour each, no two alike."""
    return [np.full((height, width, 3), (n, 90, 200), dtype=np.uint8) for n in range(count)]


@pytest.mark.parametrize(
    ("size", "count"), [((480, 832), 81), ((8, 8), 1), ((720, 405), 17), ((1, 1000), 5)]
)
def test_every_frame_is_on_it_once_and_in_order(size: tuple[int, int], count: int) -> None:
    frames = flat(*size, count)
    sheet = contact_sheet("a: kept", ["line"], [Strip("window 0", frames, ["0.000 s"] * count)])
    corners = []
    for frame in frames:
        rows, columns = np.nonzero((sheet == frame[0, 0]).all(axis=-1))
        corners.append((rows.min(), columns.min()))
        shown = (np.ptp(rows) + 1, np.ptp(columns) + 1)
        # In one piece, and in its shape but for rounding.
        assert shown[0] * shown[1] == len(rows)
        assert shown[1] / shown[0] == pytest.approx(size[1] / size[0], rel=0.05) or 1 in shown
    assert corners == sorted(corners)


def test_several_strips_stand_below_each_other() -> None:
    strips = [Strip(f"window {n}", flat(32, 32, 30)[10 * n :][:10], ["0 s"] * 10) for n in range(3)]
    sheet = contact_sheet("a", [], strips)
    tops = [np.nonzero((sheet == strip.frames[0][0, 0]).all(axis=-1))[0].min() for strip in strips]
    assert tops == sorted(set(tops))


def test_long_words_stay_inside_the_margins() -> None:
    words = "w" * 500 + " " + "a long line of words " * 40
    sheet = contact_sheet(words, [words], [Strip("l", flat(8, 8, 1), ["0 s"])], RED)
    margins = np.concatenate([sheet[:, :27], sheet[:, -27:]], axis=1)
    assert (margins == PAPER).all()
