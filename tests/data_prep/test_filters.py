"""Every filter, and both policies for metadata that is not there."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from data_prep.config import FilterConfig, PrepareConfig
from data_prep.filters import count_spans, judge_metadata, judge_source

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
