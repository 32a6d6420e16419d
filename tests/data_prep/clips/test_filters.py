"""Every filter, and both policies for metadata that is not there."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.clips.cut import Bars
from data_prep.clips.filters import (
    claimed_duration_s,
    count_spans,
    judge_bars,
    judge_metadata,
    judge_pixels,
    judge_source,
)
from data_prep.config import BucketConfig, FilterConfig, PrepareConfig
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
    ("value", "spans"),
    [
        ([["a", "b"]], 1),
        ([["a", "b"], ["b", "c"]], 2),
        ([[["a", "b"]], [["b", "c"]]], 2),
        (["a", "b"], 1),
        (None, 0),
        ([], 0),
    ],
)
def test_spans_are_counted_however_nested(value: Any, spans: int) -> None:
    assert count_spans(value) == spans


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bucket": {"num_frames": 16}}, "use 13 or 17"),
        ({"bucket": {"height": 50}}, "use 48 or 64"),
        ({"sead": 1}, "Extra inputs"),
        ({"filters": {"min_area": 3}}, "Extra inputs"),
        ({"captioner": "magic"}, "measured"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_rule(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        PrepareConfig.model_validate(values)


def test_the_digest_follows_what_decides_a_sample_and_nothing_else() -> None:
    base = PrepareConfig()
    digest = base.latent_digest("codec")
    for same in ({"deadline_s": 3.0}, {"concurrency": {"decoders": 2}}, {"verify": True}):
        assert PrepareConfig.model_validate(same).latent_digest("codec") == digest
    for other in ({"seed": 1}, {"bucket": {"fps": 4}}, {"filters": {"one_shot": False}}):
        assert PrepareConfig.model_validate(other).latent_digest("codec") != digest
    assert base.latent_digest("another") != digest


def test_every_setting_is_documented() -> None:
    def fields(model: Any) -> list[tuple[str, Any]]:
        found = []
        for name, info in model.model_fields.items():
            found.append((name, info))
            if hasattr(info.annotation, "model_fields"):
                found += fields(info.annotation)
        return found

    assert all(info.description for _, info in fields(PrepareConfig))


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


@pytest.mark.parametrize(
    ("bucket", "words"),
    [
        ({"aspects": ["16/9"]}, "WIDTH:HEIGHT"),
        ({"aspects": ["99:1"]}, "beyond 8:1"),
        ({"aspects": ["1:1"], "sizes": [[64, 64]]}, "give one of them"),
        ({"aspects": ["1:1", "2:2"]}, "same size twice"),
        ({"sizes": [[64, 50]]}, "use 48 or 64"),
    ],
)
def test_buckets_that_cannot_be_are_refused(bucket: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PrepareConfig.model_validate({"bucket": bucket})


def test_the_usual_aspects_of_480p_are_multiples_of_16_of_nearly_one_area() -> None:
    aspects = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")
    bucket = BucketConfig(num_frames=81, height=480, width=832, aspects=aspects)
    sizes = bucket.all_sizes()
    assert sizes[3:5] == [(480, 848), (848, 480)]
    for aspect, (height, width) in zip(aspects, sizes, strict=True):
        wide, high = map(int, aspect.split(":"))
        assert width / height == pytest.approx(wide / high, rel=0.04)
        assert height * width == pytest.approx(480 * 832, rel=0.04)
