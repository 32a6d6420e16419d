"""Every filter, and both policies for metadata that is not there."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from data_prep.clips.cut import Bars
from data_prep.clips.filters import (
    claimed_duration_s,
    count_shots,
    judge_bars,
    judge_metadata,
    judge_pixels,
    judge_source,
)
from data_prep.config import FilterConfig
from data_prep.sources.samples import parse_metadata

GOOD = {
    "matching_score": 0.44,
    "desirable_filtering": "desirable",
    "shot_boundary_detection": [["0:00:00.000", "0:00:05.000"]],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"matching_score": 0.43}, "low_matching_score"),
        ({"matching_score": [0.9, 0.2]}, "low_matching_score"),
        ({"desirable_filtering": "0_low_desirable_score"}, "not_desirable"),
        ({"desirable_filtering": ["desirable", "2_text"]}, "not_desirable"),
        ({"shot_boundary_detection": [["0", "1"], ["1", "2"]]}, "several_shots"),
        ({"matching_score": float("nan")}, None),
        ({"matching_score": True}, None),
    ],
)
def test_each_filter_names_its_reason(change: dict[str, Any], reason: str | None) -> None:
    drop = judge_metadata({**GOOD, **change}, FilterConfig())
    assert (drop.reason if drop else None) == reason


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [None, {}, "", [], {"a": 1}])
def test_missing_metadata_follows_the_policy(name: str, value: Any) -> None:
    metadata = {**GOOD, name: value}
    assert judge_metadata(metadata, FilterConfig(missing_metadata="keep")) is None
    drop = judge_metadata(metadata, FilterConfig(missing_metadata="drop"))
    assert drop is not None
    assert drop.reason == "missing_metadata"
    assert name in drop.detail


def test_filters_that_are_off_miss_nothing() -> None:
    off = FilterConfig(
        matching_score_above=None, desirable=False, one_shot=False, missing_metadata="drop"
    )
    assert judge_metadata({}, off) is None


def test_source_filters() -> None:
    config = FilterConfig(min_area_pixels=1000, min_duration_s=2.0)
    assert judge_source(100, 10, 2.0, config) is None
    assert judge_source(100, 10, None, config) is None
    assert judge_source(99, 10, 2.0, config).reason == "small_area"  # type: ignore[union-attr]
    assert judge_source(100, 10, 1.9, config).reason == "short_duration"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "shots"),
    [
        ([["a", "b"]], 1),
        ([["a", "b"], ["b", "c"]], 2),
        ([[["a", "b"]], [["b", "c"]]], 2),
        (["a", "b"], 1),
        (None, 0),
        ([], 0),
    ],
)
def test_shots_are_counted_however_nested(value: Any, shots: int) -> None:
    assert count_shots(value) == shots


def test_the_fields_of_panda_are_read_as_the_strings_they_are() -> None:
    """All seven columns of its tables, as its downloader writes them into a sample's json."""
    columns = {
        "videoid": "a1B2", "url": "https://example.org/a1B2", "caption": "['A car.', 'A road.']",
        "timestamp": "['0:00:13.847', '0:00:24.858']", "matching_score": "[0.44, 0.51]",
        "desirable_filtering": "['desirable', 'desirable']",
        "shot_boundary_detection": "[['0:00:00.000', '0:00:11.011']]",
    }  # fmt: skip
    metadata = parse_metadata(json.dumps(columns).encode())
    assert metadata["matching_score"] == [0.44, 0.51]
    assert claimed_duration_s(metadata) == 11.011
    strict = {"missing_metadata": "drop", "min_duration_s": 11.0}
    assert judge_metadata(metadata, FilterConfig(**strict)) is None
    for change, reason in (
        ({"matching_score": "[0.44, 0.40]"}, "low_matching_score"),
        ({"desirable_filtering": "['desirable', '1_text']"}, "not_desirable"),
        ({"shot_boundary_detection": "[['0', '1'], ['1', '2']]"}, "several_shots"),
        ({"timestamp": "['0:00:13.847', '0:00:24.000']"}, "short_duration"),
        ({"matching_score": "nan"}, "missing_metadata"),
    ):
        changed = parse_metadata(json.dumps({**columns, **change}).encode())
        drop = judge_metadata(changed, FilterConfig(**strict))
        assert drop is not None
        assert drop.reason == reason


@pytest.mark.parametrize(
    ("metadata", "seconds"),
    [
        ({"duration": 3}, 3.0),
        ({"clips": [["0:00:01.5", "0:01:00"]]}, 58.5),
        ({"timestamp": [2, 5.5]}, 3.5),
        ({"timestamp": ["1:00:00.0", "1:00:02.0"]}, 2.0),
        ({"clips": [["0:00:01", "0:00:02"], ["0:00:05", "0:00:09"]]}, None),
        ({"clips": [["0:00:09", "0:00:01"]], "duration": -1}, None),
        ({"clips": "nonsense", "timestamp": [["a", "b"]]}, None),
        ({}, None),
    ],
)
def test_the_claimed_length_is_that_of_the_one_span(
    metadata: dict[str, Any], seconds: float | None
) -> None:
    assert claimed_duration_s(metadata) == seconds


def test_a_claimed_size_drops_before_decoding() -> None:
    config = FilterConfig(min_area_pixels=1000)
    drop = judge_metadata({**GOOD, "height": 20, "width": "40"}, config)
    assert drop is None  # a width that is no number: the decoder will tell
    drop = judge_metadata({**GOOD, "height": 20, "width": 40}, config)
    assert drop is not None
    assert drop.reason == "small_area"


def textured(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("frames", "settings", "reason"),
    [
        (textured(8), {"static_below": 0.5}, None),
        (np.repeat(textured(1), 8, 0), {"static_below": 0.5}, "static_clip"),
        (np.repeat(textured(1), 8, 0), {}, None),
        (textured(1), {"static_below": 0.5}, None),
        (np.full((8, 8, 8, 3), 20, np.uint8), {"max_black_frames": 0.9}, "black_frames"),
        (np.full((8, 8, 8, 3), 21, np.uint8), {"max_black_frames": 0.9}, None),
        (np.full((8, 8, 8, 3), 235, np.uint8), {"max_white_frames": 0.9}, "white_frames"),
        (np.full((8, 8, 8, 3), 234, np.uint8), {"max_white_frames": 0.0}, None),
    ],
)
def test_pixel_filters(frames: np.ndarray, settings: dict[str, Any], reason: str | None) -> None:
    drop = judge_pixels(frames, FilterConfig(**settings))
    assert (drop.reason if drop else None) == reason


def test_the_share_of_black_frames_decides() -> None:
    frames = textured(8)
    frames[:2] = 0
    assert judge_pixels(frames, FilterConfig(max_black_frames=0.25)) is None
    drop = judge_pixels(frames, FilterConfig(max_black_frames=0.24))
    assert drop is not None
    assert drop.detail == "2 of 8 frames are black"


def test_bars_may_take_so_much_and_no_more() -> None:
    assert judge_bars(Bars(25, 25, 0, 0), 100, 100, FilterConfig()) is None
    assert judge_bars(Bars(25, 26, 0, 0), 100, 100, FilterConfig()).reason == "letterbox"  # type: ignore[union-attr]
