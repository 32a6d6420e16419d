"""Crops that keep the middle, buckets by aspect, black bars."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.clips.cut import (
    BarMeter,
    Bars,
    crop_box,
    fit_frame,
    nearest_size,
)


@pytest.mark.parametrize("size", [(360, 640), (361, 640), (640, 360), (64, 64), (30, 50)])
def test_crops_keep_the_middle_and_the_aspect(size: tuple[int, int]) -> None:
    left, top, right, bottom = crop_box(*size, 48, 64)
    assert (right - left) / (bottom - top) == pytest.approx(64 / 48)
    assert left + right == pytest.approx(size[1])
    assert top + bottom == pytest.approx(size[0])
    assert left >= 0
    assert top >= 0


def test_shrinking_averages_instead_of_skipping() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    small = fit_frame(stripes, 8, 8)
    assert small.shape == (8, 8, 3)
    assert np.abs(small[1:-1, 1:-1].astype(int) - 100).max() <= 5


def test_a_frame_of_the_right_size_is_not_touched() -> None:
    frame_HW3 = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    assert fit_frame(frame_HW3, 32, 48) is frame_HW3


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((360, 640), (48, 80)), ((640, 360), (80, 48)), ((100, 101), (64, 64)), ((10, 400), (48, 80))],
)
def test_the_bucket_is_the_nearest_in_aspect(
    size: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert nearest_size(*size, [(64, 64), (48, 80), (80, 48)]) == bucket


def measured(*frames: np.ndarray) -> Bars:
    meter = BarMeter()
    for frame in frames:
        meter.add(frame)
    return meter.bars()


def picture(height: int = 60, width: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(30, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("bars", [(10, 10, 0, 0), (0, 0, 20, 21), (8, 7, 12, 12), (0, 0, 0, 0)])
def test_bars_are_measured_to_the_pixel(bars: tuple[int, int, int, int]) -> None:
    framed = np.pad(picture(), (bars[:2], bars[2:], (0, 0)), constant_values=16)
    meter_bars = measured(framed, framed)
    assert meter_bars == Bars(*bars)
    np.testing.assert_array_equal(meter_bars.cut(framed), picture())
    assert meter_bars.size_inside(*framed.shape[:2]) == (60, 100)


def test_what_only_looks_like_bars_is_left_alone() -> None:
    night = picture()
    night[:30] = 0
    assert measured(night) == Bars()  # dark on one side only
    assert measured(np.zeros((60, 100, 3), dtype=np.uint8)) == Bars()
    framed = np.pad(picture(), ((10, 10), (0, 0), (0, 0)))
    assert measured(framed, np.pad(picture(), ((20, 0), (0, 0), (0, 0)))) == Bars()
    subtitled = framed.copy()
    subtitled[-5:-2, 30:60] = 255
    assert measured(framed, subtitled) == Bars()
    # A fade from black hides nothing: all frames count.
    assert measured(np.zeros_like(framed), framed) == Bars(10, 10, 0, 0)


def test_frames_of_two_sizes_have_no_bars() -> None:
    framed = np.pad(picture(), ((10, 10), (0, 0), (0, 0)))
    assert measured(framed, picture(40, 40)) == Bars()
