"""Which frames of a video make a window: exact arithmetic on its times, seed and key.

All times are whole numbers of one unit that divides both the video's ticks and the wanted steps, so
that every machine chooses the same frames. Knows nothing of decoders or files.

    ClipTooShort(FlowreelError, ValueError)   too_short: the source ends before the window does
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from flowreel.errors import FlowreelError

_HASH_BITS = 64


class ClipTooShort(FlowreelError, ValueError):
    """The source is shorter than the window of frames."""

    reason = "too_short"


@dataclass(frozen=True)
class Timeline:
    """When the frames of a video are shown.

    >>> Timeline.at_rate(25, Fraction(25)).last_s
    Fraction(24, 25)
    """

    ticks: npt.NDArray[np.int64]
    """[N] presentation times, never falling, from 0."""
    time_base: Fraction
    """Seconds of a tick."""

    @classmethod
    def at_rate(cls, num_frames: int, rate: Fraction | int) -> Timeline:
        """Frames at even steps, `rate` a second."""
        return cls(np.arange(num_frames, dtype=np.int64), 1 / Fraction(rate))

    @property
    def last_s(self) -> Fraction:
        """Time of the last frame; 0 where there is none."""
        return int(self.ticks[-1]) * self.time_base if len(self.ticks) else Fraction(0)

    @property
    def rate(self) -> Fraction | None:
        """Frames per second by the median step: one long gap does not make a film slow.

        None of fewer than two frames, or where most frames are shown at one time.
        """
        steps = np.sort(np.diff(self.ticks))
        step = int(steps[len(steps) // 2]) * self.time_base if len(steps) else Fraction(0)
        return 1 / step if step else None

    def largest_gap_s(self, window: Sequence[int], fps: float) -> Fraction:
        """The longest time from a frame to the next while a window of frames is shown."""
        first, last = window[0], window[-1]
        step_s = 1 / exact_rate(fps)
        end_s = int(self.ticks[first]) * self.time_base + (len(window) - 1) * step_s
        # A window that ends between two frames runs into the time between them.
        runs_on = end_s - int(self.ticks[last]) * self.time_base > step_s / 2
        inside = self.ticks[first : last + (2 if runs_on else 1)]
        return int(np.diff(inside).max()) * self.time_base if len(inside) > 1 else Fraction(0)


def exact_rate(fps: float) -> Fraction:
    """A frame rate as the number that a user wrote.

    >>> exact_rate(23.976), exact_rate(8.0)
    (Fraction(2997, 125), Fraction(8, 1))
    """
    return Fraction(str(fps))


def key_hash(seed: int, key: str) -> int:
    """A whole number under 2⁶⁴ from (seed, key) alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[: _HASH_BITS // 8], "big")


def _share(number: int, whole: int) -> int:
    """number / 2⁶⁴ of a whole number of units, rounded down."""
    return number * whole >> _HASH_BITS


class _Units:
    """A timeline and a frame rate in one unit of time, whole numbers all."""

    def __init__(self, timeline: Timeline, fps: float) -> None:
        step = 1 / exact_rate(fps)
        per_second = math.lcm(timeline.time_base.denominator, step.denominator)
        tick = int(timeline.time_base * per_second)
        self.step = int(step * per_second)
        self.times = [int(t) * tick for t in timeline.ticks]

    def room_of(self, num_frames: int) -> int | None:
        """What is left of the time to the last frame by a window of so many; None: too short.

        The last target time may lie half a step past the last frame.
        """
        room = (self.times[-1] if self.times else 0) - (num_frames - 1) * self.step
        return None if not self.times or 2 * room < -self.step else max(0, room)

    def window_from(self, wanted: int, num_frames: int) -> list[int]:
        """The window from the last frame at or before a time: to each target the nearest frame."""
        times = self.times
        # A start on a source frame keeps the steps even wherever one rate divides the other.
        start = times[max(0, bisect_right(times, wanted) - 1)]
        return [self._nearest(start + n * self.step) for n in range(num_frames)]

    def _nearest(self, target: int) -> int:
        """The frame nearest to a time; of two equally near the earlier."""
        after = min(bisect_left(self.times, target), len(self.times) - 1)
        before = max(0, after - 1)
        return before if target - self.times[before] <= self.times[after] - target else after


def _too_short(timeline: Timeline, num_frames: int, fps: float, what: str = "") -> ClipTooShort:
    return ClipTooShort(
        f"the video's last frame is at {float(timeline.last_s):.3f} s; {num_frames} frames at "
        f"{fps:g} fps{what} need one at {(num_frames - 1) / fps:.3f} s"
    )


def longest_fit(timeline: Timeline, frame_counts: Sequence[int], fps: float) -> int:
    """The largest of several numbers of frames of which a window fits, as `choose_window` judges.

    >>> longest_fit(Timeline.at_rate(40, 16), [81, 49, 33, 17], 16.0)
    33

    Raises:
        ClipTooShort: not even the smallest fits.
    """
    units = _Units(timeline, fps)
    counts = sorted(frame_counts, reverse=True)
    for count in counts:
        if units.room_of(count) is not None:
            return count
    others = f", the fewest of {', '.join(map(str, counts))}," if len(counts) > 1 else ""
    raise _too_short(timeline, counts[-1], fps, others)


def choose_window(
    timeline: Timeline, num_frames: int, fps: float, *, seed: int, key: str
) -> list[int]:
    """Places of the frames of one window: `num_frames` of them at `fps`, by their real times.

    The window starts at a frame chosen by hash(seed, key). Each target time takes the source frame
    nearest to it, so that a source of a lower rate repeats frames and one of a higher rate skips
    some.

    >>> choose_window(Timeline.at_rate(20, 16), 5, 8.0, seed=0, key="a")
    [6, 8, 10, 12, 14]

    Args:
        timeline: of the source.
        num_frames: frames wanted.
        fps: target rate, frames per second.
        seed: the run's seed.
        key: the sample's key.

    Raises:
        ClipTooShort: the last target time lies more than half a target step past the last frame.
    """
    units = _Units(timeline, fps)
    room = units.room_of(num_frames)
    if room is None:
        raise _too_short(timeline, num_frames, fps)
    return units.window_from(_share(key_hash(seed, key), room), num_frames)


def choose_windows(
    timeline: Timeline, num_frames: int, fps: float, *, seed: int, key: str, at_most: int = 1
) -> list[list[int]]:
    """Places of up to `at_most` windows that do not overlap, in order of time.

    There are as many as fit, each of `num_frames` at `fps` as in `choose_window`. The time left
    over is shared out between them by hash(seed, key, number). A single window is exactly that of
    `choose_window`.

    >>> choose_windows(Timeline.at_rate(40, 16), 5, 8.0, seed=0, key="a", at_most=2)
    [[4, 6, 8, 10, 12], [15, 17, 19, 21, 23]]

    Raises:
        ClipTooShort: not even one fits.
    """
    units = _Units(timeline, fps)
    whole = num_frames * units.step
    room = max(0, units.times[-1] - (num_frames - 1) * units.step) if units.times else 0
    count = min(at_most, 1 + room // whole)
    if count <= 1:
        return [choose_window(timeline, num_frames, fps, seed=seed, key=key)]
    slack = max(0, room - (count - 1) * whole)
    places = sorted(key_hash(seed, f"{key}:{number}") for number in range(count))
    windows: list[list[int]] = []
    for number, place in enumerate(places):
        wanted = _share(place, slack) + number * whole
        # In a source of few frames the last frame of a window may be the first of the next.
        earliest = units.times[windows[-1][-1]] if windows else 0
        windows.append(units.window_from(max(wanted, earliest), num_frames))
    return windows


def without_gaps(
    timeline: Timeline, windows: Sequence[list[int]], fps: float, max_gap_s: float
) -> list[list[int]]:
    """The windows inside which no frame follows the one before it by more than so many seconds."""
    longest_s = exact_rate(max_gap_s)
    return [window for window in windows if timeline.largest_gap_s(window, fps) <= longest_s]
