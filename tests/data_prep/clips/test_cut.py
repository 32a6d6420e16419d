"""Windows by real time, chosen by seed and key alone; crops that keep the middle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_prep.clips.cut import (
    BarMeter,
    Bars,
    ClipTooShort,
    choose_window,
    choose_windows,
    crop_box,
    fit_frame,
    nearest_size,
    unit_hash,
)


@pytest.mark.parametrize("source_fps", [15.0, 16.0, 23.976, 29.97, 60.0])
def test_chosen_frames_lie_within_half_a_source_step_of_their_times(source_fps: float) -> None:
    pts_s = np.arange(int(source_fps * 4)) / source_fps
    for key in "abcdef":
        window = choose_window(pts_s, 17, 8.0, seed=0, key=key)
        wanted_s = pts_s[window[0]] + np.arange(17) / 8.0
        assert len(window) == 17
        assert max(window) < len(pts_s)
        assert (np.diff(window) >= 0).all()
        assert np.abs(pts_s[window] - wanted_s).max() <= 0.5 / source_fps + 0.5 / 8.0 * 0.01


def test_rates_that_divide_give_an_even_step() -> None:
    pts_s = np.arange(100) / 24.0
    for key in "abcdef":
        assert set(np.diff(choose_window(pts_s, 17, 8.0, seed=1, key=key))) == {3}


def test_jumping_timestamps_are_followed() -> None:
    pts_s = np.concatenate([np.arange(10) / 10, 2 + np.arange(11) / 10])
    window = choose_window(pts_s, 13, 4.0, seed=0, key="a")
    np.testing.assert_array_less(np.abs(pts_s[window] - pts_s[window[0]] - np.arange(13) / 4), 0.56)


def test_the_window_depends_on_seed_and_key_alone() -> None:
    pts_s = np.arange(400) / 30.0
    starts = [choose_window(pts_s, 9, 8.0, seed=0, key=f"k{n}")[0] for n in range(200)]
    assert starts == [choose_window(pts_s, 9, 8.0, seed=0, key=f"k{n}")[0] for n in range(200)]
    assert starts != [choose_window(pts_s, 9, 8.0, seed=1, key=f"k{n}")[0] for n in range(200)]
    # Spread over all the room there is: 400 frames less one second at 30 fps.
    assert np.ptp(starts) > 330


def test_short_videos_are_refused_with_both_lengths() -> None:
    with pytest.raises(ClipTooShort, match=r"1\.900 s.*2\.000 s") as caught:
        choose_window(np.arange(20) / 10, 17, 8.0, seed=0, key="a")
    assert caught.value.reason == "too_short"


@pytest.mark.parametrize("pts_s", [np.zeros(0), np.zeros(1), np.zeros(50)])
def test_no_time_is_too_short(pts_s: np.ndarray) -> None:
    with pytest.raises(ClipTooShort):
        choose_window(pts_s, 17, 8.0, seed=0, key="a")


def test_one_frame_is_enough_for_an_image_bucket() -> None:
    assert choose_window(np.zeros(1), 1, 8.0, seed=0, key="a") == [0]


def test_hashes_are_even() -> None:
    values = [unit_hash(3, str(n)) for n in range(4000)]
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert counts.min() > 320


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


@pytest.mark.parametrize("source_fps", [3.0, 10.0, 16.0, 23.976, 60.0])
@pytest.mark.parametrize("at_most", [1, 2, 5, 50])
def test_windows_of_a_clip_are_whole_in_order_and_do_not_overlap(
    source_fps: float, at_most: int
) -> None:
    pts_s = np.arange(int(source_fps * 9)) / source_fps
    for key in "abcdef":
        windows = choose_windows(pts_s, 9, 8.0, seed=3, key=key, at_most=at_most)
        assert len(windows) == min(at_most, int((pts_s[-1] + 1 / 8) / (9 / 8) + 1e-9))
        flat = [index for window in windows for index in window]
        assert flat == sorted(flat)
        assert flat[-1] < len(pts_s)
        for window in windows:
            wanted_s = pts_s[window[0]] + np.arange(9) / 8.0
            assert np.abs(pts_s[window] - wanted_s).max() <= 1.0 / source_fps
        if source_fps >= 8:
            starts = [pts_s[window[0]] for window in windows]
            assert all(b - a >= 9 / 8.0 - 1 / source_fps for a, b in itertools.pairwise(starts))


def test_one_window_of_many_is_the_one_window() -> None:
    pts_s = np.arange(200) / 24.0
    for key in "abcdef":
        window = choose_window(pts_s, 17, 8.0, seed=0, key=key)
        assert choose_windows(pts_s, 17, 8.0, seed=0, key=key) == [window]
    short = np.arange(50) / 24.0
    assert len(choose_windows(short, 17, 8.0, seed=0, key="a", at_most=9)) == 1
    with pytest.raises(ClipTooShort):
        choose_windows(short[:9], 17, 8.0, seed=0, key="a", at_most=9)


def test_windows_depend_on_seed_and_key() -> None:
    pts_s = np.arange(400) / 24.0
    made = {
        str(choose_windows(pts_s, 9, 8.0, seed=s, key=k, at_most=4)) for s in (0, 1) for k in "ab"
    }
    assert len(made) == 4


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
