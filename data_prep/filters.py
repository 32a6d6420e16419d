"""What is kept and why not: decisions on metadata and on what the decoder found.

Pure policies that return a `Drop` or None; the reasons are those of status rows. Knows nothing of
pixels, Ray or files.

    low_matching_score, not_desirable, several_shots     from the json that Panda-70M writes
    missing_metadata                                     where the run's policy is `drop`
    small_area, short_duration                           from the decoder
"""

from __future__ import annotations

from typing import Any, NamedTuple

from data_prep.config import FilterConfig


class Drop(NamedTuple):
    """A sample is not kept: the reason code and the values behind it."""

    reason: str
    detail: str


def judge_metadata(metadata: dict[str, Any], config: FilterConfig) -> Drop | None:
    """The first metadata filter that a sample fails. Costs nothing, so it comes before decoding.

    Fields may hold one value or a list for the clip's parts: every part must pass.
    """
    missing = []
    if config.matching_score_above is not None:
        scores = _numbers(metadata.get("matching_score"))
        if not scores:
            missing.append("matching_score")
        elif min(scores) <= config.matching_score_above:
            return Drop(
                "low_matching_score",
                f"matching score {min(scores):g}, not above {config.matching_score_above:g}",
            )
    if config.desirable:
        marks = _texts(metadata.get("desirable_filtering"))
        if not marks:
            missing.append("desirable_filtering")
        elif any(mark != "desirable" for mark in marks):
            return Drop("not_desirable", f"marked {', '.join(marks)[:200]}")
    if config.one_shot:
        shots = count_spans(metadata.get("shot_boundary_detection"))
        if not shots:
            missing.append("shot_boundary_detection")
        elif shots > 1:
            return Drop("several_shots", f"{shots} shots")
    if missing and config.missing_metadata == "drop":
        return Drop("missing_metadata", f"no readable {', '.join(missing)}")
    return None


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


def count_spans(value: Any) -> int:
    """How many (start, end) spans a shot list holds, however it is nested; 0 where it is none.

    >>> count_spans([["0:00:00.000", "0:00:11.178"]]), count_spans("nonsense")
    (1, 0)
    """
    spans, stack, visited = 0, [value], 0
    while stack and visited < 100_000:
        item = stack.pop()
        visited += 1
        if not isinstance(item, list | tuple) or not item:
            continue
        if all(isinstance(part, str | int | float) for part in item):
            spans += 1
        else:
            stack.extend(item)
    return spans


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
