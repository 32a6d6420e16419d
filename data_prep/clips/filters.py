"""Which samples are kept and why not: decisions on metadata and on what the decoder found.

Pure policies that return a `Drop` or None; the reasons are those of status rows. Knows nothing of
Ray or files.

    low_matching_score, not_desirable, several_shots     from the json that Panda-70M writes
    missing_metadata                                     only if the run's policy is `drop`
    small_area, short_duration                           from the json, and from the decoder
    interlaced, low_rate, gap                            from the container and its times
    too_small                                            from the size, against the bucket's
    static_clip, black_frames, white_frames, letterbox   from the pixels
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from data_prep.clips.buckets import BucketConfig, Size
from data_prep.clips.cut import Bars, enlargement
from data_prep.clips.windows import Timeline, exact_rate
from data_prep.config import FilterConfig
from media.frames import Frames

_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")
_BLACK, _WHITE = 20, 235
"""Grey levels up to and from which a pixel is black and white."""
_NEARLY_ALL = 0.99


class Drop(NamedTuple):
    """A sample is not kept: the reason code and the values behind it."""

    reason: str
    detail: str


def judge_metadata(metadata: dict[str, Any], config: FilterConfig) -> Drop | None:
    """The first metadata filter that a sample fails. Costs nothing, so it comes before decoding.

    Fields may hold one value or a list for the clip's parts: every part must pass.

    >>> judge_metadata({"matching_score": [0.5, 0.4]}, FilterConfig())
    Drop(reason='low_matching_score', detail='matching score 0.4, not above 0.43')
    >>> judge_metadata({"matching_score": 0.5}, FilterConfig()) is None
    True
    """
    if config.matching_score_above is not None:
        scores = _numbers(metadata.get("matching_score"))
        if scores and min(scores) <= config.matching_score_above:
            return Drop(
                "low_matching_score",
                f"matching score {min(scores):g}, not above {config.matching_score_above:g}",
            )
    if config.desirable:
        marks = _texts(metadata.get("desirable_filtering"))
        if any(mark != "desirable" for mark in marks):
            return Drop("not_desirable", f"marked {', '.join(marks)[:200]}")
    if config.one_shot:
        shots = count_shots(metadata.get("shot_boundary_detection"))
        if shots > 1:
            return Drop("several_shots", f"{shots} shots")
    absent = absent_fields(metadata, config)
    if absent and config.missing_metadata == "drop":
        return Drop("missing_metadata", f"no readable {', '.join(absent)}")
    return _judge_claims(metadata, config)


def absent_fields(metadata: dict[str, Any], config: FilterConfig) -> list[str]:
    """The fields that a metadata filter in use reads and that hold no value it can judge.

    >>> absent_fields({"matching_score": [0.5], "desirable_filtering": ""}, FilterConfig())
    ['desirable_filtering', 'shot_boundary_detection']
    """
    absent = []
    if config.matching_score_above is not None and not _numbers(metadata.get("matching_score")):
        absent.append("matching_score")
    if config.desirable and not _texts(metadata.get("desirable_filtering")):
        absent.append("desirable_filtering")
    if config.one_shot and not count_shots(metadata.get("shot_boundary_detection")):
        absent.append("shot_boundary_detection")
    return absent


def _judge_claims(metadata: dict[str, Any], config: FilterConfig) -> Drop | None:
    """Size and length as the json claims them; where it claims none, the decoder will tell."""
    sides = [_numbers(metadata.get(name)) for name in ("height", "width")]
    if all(len(side) == 1 and side[0] > 0 for side in sides):
        drop = judge_source(int(sides[0][0]), int(sides[1][0]), None, config)
        if drop is not None:
            return drop
    duration_s = claimed_duration_s(metadata)
    if duration_s is not None and duration_s < config.min_duration_s:
        return Drop("short_duration", f"{duration_s:.3f} s, under {config.min_duration_s:g} s")
    return None


def claimed_duration_s(metadata: dict[str, Any]) -> float | None:
    """Length of the clip by its json: `duration`, or the one shot in `clips` or `timestamp`.

    >>> claimed_duration_s({"clips": [["0:00:13.847", "0:00:24.858"]]})
    11.011
    """
    plain = _numbers(metadata.get("duration"))
    if len(plain) == 1 and plain[0] > 0:
        return plain[0]
    for name in ("clips", "timestamp"):
        shots = list(_shots(metadata.get(name)))
        if len(shots) == 1 and len(shots[0]) == 2:
            begin_s, end_s = (_seconds(part) for part in shots[0])
            if begin_s is not None and end_s is not None and end_s > begin_s:
                return round(end_s - begin_s, 6)
    return None


def _seconds(value: Any) -> float | None:
    """Seconds of a number or of H:MM:SS.mmm."""
    if isinstance(value, str) and (match := _CLOCK.fullmatch(value.strip())):
        hours, minutes, seconds = match.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    numbers = _numbers(value)
    return numbers[0] if len(numbers) == 1 else None


def judge_source(
    height: int, width: int, duration_s: float | None, config: FilterConfig
) -> Drop | None:
    """The first filter on the source itself that fails (`duration_s` is None for images)."""
    if height * width < config.min_area_pixels:
        return Drop(
            "small_area",
            f"{height}×{width} = {height * width} pixels, under {config.min_area_pixels}",
        )
    if duration_s is not None and duration_s < config.min_duration_s:
        return Drop("short_duration", f"{duration_s:.3f} s, under {config.min_duration_s:g} s")
    return None


def judge_container(facts: Mapping[str, Any], config: FilterConfig) -> Drop | None:
    """Whether the container says that the frames are no whole pictures.

    >>> judge_container({"interlaced": True}, FilterConfig()).reason
    'interlaced'
    """
    if config.progressive and facts["interlaced"]:
        return Drop("interlaced", "frames of two fields each, which motion tears into combs")
    return None


def judge_times(timeline: Timeline, config: FilterConfig) -> Drop | None:
    """Whether a source shows too few frames a second; one of a single frame has no rate.

    >>> judge_times(Timeline.at_rate(20, 1), FilterConfig()).reason
    'low_rate'
    """
    rate = timeline.rate
    if rate is not None and rate < exact_rate(config.min_source_fps):
        return Drop(
            "low_rate", f"{float(rate):g} frames per second, under {config.min_source_fps:g}"
        )
    return None


def judge_enlargement(height: int, width: int, size: Size, config: BucketConfig) -> Drop | None:
    """Whether a picture of this size would be enlarged too much to fill a bucket's.

    >>> judge_enlargement(360, 640, (480, 848), BucketConfig(max_enlargement=1.1)).detail
    '360×640 would be enlarged 1.333 times to fill 480×848, over 1.1'
    """
    most, times = config.max_enlargement, enlargement(height, width, *size)
    if most is None or times <= most:
        return None
    return Drop(
        "too_small",
        f"{height}×{width} would be enlarged {times:.3f} times to fill {size[0]}×{size[1]}, "
        f"over {most:g}",
    )


def judge_bars(bars: Bars, height: int, width: int, config: FilterConfig) -> Drop | None:
    """Whether the black bars of a source of this size leave too little picture."""
    inside_height, inside_width = bars.size_inside(height, width)
    share = 1 - inside_height * inside_width / (height * width)
    if share > config.max_bar_share:
        return Drop(
            "letterbox", f"bars take {share:.3f} of the area, over {config.max_bar_share:g}"
        )
    return None


def judge_pixels(frames_THW3: Frames, config: FilterConfig) -> Drop | None:
    """The first pixel filter that a window of frames fails, by the mean of their three colours.

    A frame is black if 99% of its pixels are at most 20 of 255, and white if they are at least 235.
    A single frame, an image, is never static.

    >>> still = np.full((5, 8, 8, 3), 100, np.uint8)
    >>> judge_pixels(still, FilterConfig(static_below=0.5)).reason
    'static_clip'
    """
    shares = ((config.max_black_frames, "black"), (config.max_white_frames, "white"))
    if config.static_below is None and all(most is None for most, _ in shares):
        return None
    grey_TP = frames_THW3.mean(axis=-1, dtype=np.float32).reshape(len(frames_THW3), -1)
    for most, name in shares:
        if most is None:
            continue
        extreme_TP = grey_TP <= _BLACK if name == "black" else grey_TP >= _WHITE
        count = int((extreme_TP.mean(axis=1) >= _NEARLY_ALL).sum())
        if count > most * len(grey_TP):
            return Drop(f"{name}_frames", f"{count} of {len(grey_TP)} frames are {name}")
    if config.static_below is not None and len(grey_TP) > 1:
        change = float(np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(grey_TP)]))
        if change < config.static_below:
            return Drop(
                "static_clip",
                f"frames change by {change:.3f} grey levels, under {config.static_below:g}",
            )
    return None


def count_shots(value: Any) -> int:
    """How many shots (start, end) a list of them holds, however it is nested; 0 if it is none.

    >>> count_shots([["0:00:00.000", "0:00:11.178"]]), count_shots("nonsense")
    (1, 0)
    """
    return sum(1 for _ in _shots(value))


def _shots(value: Any) -> Iterator[Any]:
    """The innermost lists of plain values, in no order."""
    stack, visited = [value], 0
    while stack and visited < 100_000:
        item = stack.pop()
        visited += 1
        if not isinstance(item, list | tuple) or not item:
            continue
        if all(isinstance(part, str | int | float) for part in item):
            yield item
        else:
            stack.extend(item)


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and v == v for v in values
    ):
        return []
    return [float(v) for v in values]


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [str(v) for v in values] if all(isinstance(v, str) and v for v in values) else []
