"""Windows by real time, chosen by seed and key alone, in exact arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from data_prep.clips.windows import (
    ClipTooShort,
    Timeline,
    choose_window,
    choose_windows,
    exact_rate,
    key_hash,
    longest_fit,
    without_gaps,
)

RATES = [Fraction(15), Fraction(16), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60)]


def seconds(timeline: Timeline) -> list[Fraction]:
    return [int(tick) * timeline.time_base for tick in timeline.ticks]


@pytest.mark.parametrize("rate", RATES)
def test_chosen_frames_are_the_nearest_to_their_times(rate: Fraction) -> None:
    timeline = Timeline.at_rate(int(rate * 4), rate)
    times = seconds(timeline)
    for key in "abcdef":
        window = choose_window(timeline, 17, 8.0, seed=0, key=key)
        targets = [times[window[0]] + Fraction(n, 8) for n in range(17)]
        for place, target in zip(window, targets, strict=True):
            assert place == min(range(len(times)), key=lambda n: (abs(times[n] - target), n))


def test_rates_that_divide_give_an_even_step() -> None:
    timeline = Timeline.at_rate(100, 24)
    for key in "abcdef":
        assert set(np.diff(choose_window(timeline, 17, 8.0, seed=1, key=key))) == {3}


@pytest.mark.parametrize("ticks_per_s", [24, 1000, 12800, 90000])
def test_the_unit_in_which_a_container_counts_changes_nothing(ticks_per_s: int) -> None:
    # Multiples of 24 ticks are exact in all of them but in thousandths, as containers round those.
    ticks = np.array([n * ticks_per_s // 24 for n in range(200)], dtype=np.int64)
    window = choose_window(Timeline(ticks, Fraction(1, ticks_per_s)), 17, 8.0, seed=3, key="a")
    exact = choose_window(Timeline.at_rate(200, 24), 17, 8.0, seed=3, key="a")
    assert np.abs(np.array(window) - exact).max() <= (ticks_per_s == 1000)


def test_jumping_timestamps_are_followed() -> None:
    ticks = np.array([*range(10), *range(20, 31)], dtype=np.int64)
    timeline = Timeline(ticks, Fraction(1, 10))
    window = choose_window(timeline, 13, 4.0, seed=0, key="a")
    times = seconds(timeline)
    for n, place in enumerate(window):
        assert abs(times[place] - times[window[0]] - Fraction(n, 4)) < Fraction(56, 100)


def test_the_window_depends_on_seed_and_key_alone() -> None:
    timeline = Timeline.at_rate(400, 30)

    def starts(seed: int) -> list[int]:
        return [choose_window(timeline, 9, 8.0, seed=seed, key=f"k{n}")[0] for n in range(200)]

    assert starts(0) == starts(0) != starts(1)
    # Spread over all the room there is: 400 frames less one second at 30 fps.
    assert np.ptp(starts(0)) > 330


def test_short_videos_are_refused_with_both_lengths() -> None:
    with pytest.raises(ClipTooShort, match=r"1\.900 s.*2\.000 s") as caught:
        choose_window(Timeline.at_rate(20, 10), 17, 8.0, seed=0, key="a")
    assert caught.value.reason == "too_short"


COUNTS = (81, 49, 33, 17)


def fits(timeline: Timeline, count: int, fps: float) -> bool:
    try:
        choose_window(timeline, count, fps, seed=0, key="a")
    except ClipTooShort:
        return False
    return True


@pytest.mark.parametrize("rate", [Fraction(5), *RATES])
@pytest.mark.parametrize("fps", [8.0, 16.0, 23.976])
def test_the_longest_that_fits_is_the_longest_of_which_a_window_fits(
    rate: Fraction, fps: float
) -> None:
    found = set()
    for num_frames in [1, 2, *range(3, int(11 * rate), max(1, int(rate / 4)))]:
        timeline = Timeline.at_rate(num_frames, rate)
        fitting = [count for count in COUNTS if fits(timeline, count, fps)]
        if not fitting:
            with pytest.raises(ClipTooShort):
                longest_fit(timeline, COUNTS, fps)
            continue
        longest = longest_fit(timeline, COUNTS[::-1], fps)
        assert longest == max(fitting)
        found.add(longest)
        for at_most in (1, 4):
            windows = choose_windows(timeline, longest, fps, seed=1, key="b", at_most=at_most)
            assert all(len(window) == longest for window in windows)
            assert 0 <= min(map(min, windows)) <= max(map(max, windows)) < num_frames
    assert found == set(COUNTS)


def test_the_bound_between_two_lengths_is_exact() -> None:
    # 49 frames at 16 fps end at 3 s; the last may be missed by half a step, 1/32 s, and no more.
    for last_ms, longest in ((3000, 49), (2969, 49), (2968, 33)):
        timeline = Timeline(np.array([*range(0, 2960, 40), last_ms]), Fraction(1, 1000))
        assert longest_fit(timeline, COUNTS, 16.0) == longest


def test_a_video_under_the_shortest_length_is_refused_with_both_and_all_lengths() -> None:
    words = (
        r"is at 0\.900 s; 17 frames at 16 fps, the fewest of 81, 49, 33, 17, need one at 1\.000 s"
    )
    with pytest.raises(ClipTooShort, match=words):
        longest_fit(Timeline.at_rate(10, 10), COUNTS, 16.0)
    alone = Timeline.at_rate(20, 10)
    messages = []
    for call in (
        lambda: longest_fit(alone, [17], 8.0),
        lambda: choose_window(alone, 17, 8.0, seed=0, key="a"),
    ):
        with pytest.raises(ClipTooShort) as caught:
            call()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("count", [0, 1, 50])
def test_no_time_is_too_short(count: int) -> None:
    at_once = Timeline(np.zeros(count, dtype=np.int64), Fraction(1, 25))
    with pytest.raises(ClipTooShort):
        choose_window(at_once, 17, 8.0, seed=0, key="a")


def test_one_frame_is_enough_for_an_image_bucket() -> None:
    assert choose_window(Timeline.at_rate(1, 25), 1, 8.0, seed=0, key="a") == [0]


def test_hashes_are_even() -> None:
    values = [key_hash(3, str(n)) / 2**64 for n in range(4000)]
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert counts.min() > 320


@pytest.mark.parametrize("rate", [Fraction(3), Fraction(10), *RATES])
@pytest.mark.parametrize("at_most", [1, 2, 5, 50])
def test_windows_of_a_clip_are_whole_in_order_and_do_not_overlap(
    rate: Fraction, at_most: int
) -> None:
    timeline = Timeline.at_rate(int(rate * 9), rate)
    times = seconds(timeline)
    for key in "abcdef":
        windows = choose_windows(timeline, 9, 8.0, seed=3, key=key, at_most=at_most)
        assert len(windows) == min(at_most, int((times[-1] + Fraction(1, 8)) / Fraction(9, 8)))
        flat = [index for window in windows for index in window]
        assert flat == sorted(flat)
        assert flat[-1] < len(times)
        for window in windows:
            for n, place in enumerate(window):
                assert abs(times[place] - times[window[0]] - Fraction(n, 8)) <= 1 / rate
        if rate >= 8:
            starts = [times[window[0]] for window in windows]
            assert all(b - a >= Fraction(9, 8) - 1 / rate for a, b in itertools.pairwise(starts))


def test_one_window_of_many_is_the_one_window() -> None:
    timeline, short = Timeline.at_rate(200, 24), Timeline.at_rate(50, 24)
    for key in "abcdef":
        window = choose_window(timeline, 17, 8.0, seed=0, key=key)
        assert choose_windows(timeline, 17, 8.0, seed=0, key=key) == [window]
    assert len(choose_windows(short, 17, 8.0, seed=0, key="a", at_most=9)) == 1
    with pytest.raises(ClipTooShort):
        choose_windows(Timeline.at_rate(9, 24), 17, 8.0, seed=0, key="a", at_most=9)


def test_windows_depend_on_seed_and_key() -> None:
    timeline = Timeline.at_rate(400, 24)
    made = {
        str(choose_windows(timeline, 9, 8.0, seed=s, key=k, at_most=4))
        for s in (0, 1)
        for k in "ab"
    }
    assert len(made) == 4


def test_windows_with_a_gap_are_left_out_and_the_rate_is_that_of_most_frames() -> None:
    ticks = np.array([*range(50), *range(800, 850)], dtype=np.int64)
    timeline = Timeline(ticks, Fraction(1, 25))
    assert timeline.rate == 25
    windows = [[0, 10, 20], [40, 49, 50], [49, 49, 49], [60, 70, 80]]
    gaps = [timeline.largest_gap_s(window, 2.5) for window in windows]
    assert gaps == [Fraction(1, 25), Fraction(751, 25), Fraction(751, 25), Fraction(1, 25)]
    assert without_gaps(timeline, windows, 2.5, max_gap_s=1.0) == [windows[0], windows[3]]


def test_a_rate_is_the_number_that_was_written() -> None:
    assert exact_rate(23.976) == Fraction(23976, 1000)
    assert exact_rate(0.1) == Fraction(1, 10)
