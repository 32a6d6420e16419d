"""The closing lines hide nothing: shards that were not read, filters that judged nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.clips.filters import absent_fields
from data_prep.config import BucketConfig, FilterConfig, PrepareConfig
from data_prep.latents.inspection import inspect_dataset
from data_prep.ledger.problems import ShardProblem
from data_prep.run import PrepareReport
from data_prep.sources.samples import write_shard
from pipeline.console import Reporter
from pipeline.dataset_page import figures, print_tables, render
from pipeline.recipes import TINY_CODEC
from pipeline.tables import say_prepared, say_shard_problems
from tests.data_prep.bad_media import moving, video
from tests.data_prep.in_process import digests, prepare_locally

CLIPS = PrepareConfig(bucket=BucketConfig(num_frames=5, height=32, width=32, fps=8.0))


def said(report: PrepareReport, capsys: pytest.CaptureFixture[str]) -> str:
    say_prepared(report, Reporter())
    return " ".join(capsys.readouterr().out.split())


def test_a_lone_unreadable_shard_is_no_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.tar").write_text("just a text\n")
    shards = [str(tmp_path / "x.tar")]
    first = said(prepare_locally(CLIPS, shards, tmp_path / "out", TINY_CODEC), capsys)
    again = said(prepare_locally(CLIPS, shards, tmp_path / "out", TINY_CODEC), capsys)
    assert "nothing to do" not in first
    assert "nothing to do" in again
    for text in (first, again):
        assert "1 of 1 shards not read to their end: 1 unreadable, 0 truncated" in text
        assert "x │ unreadable │ not a readable tar" in text


def test_what_was_wrong_with_shards_is_in_tables_page_and_json_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = video(moving(20))
    write_shard(tmp_path / "a.tar", [{"__key__": str(n), "mp4": clip} for n in range(2)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x.tar").write_text("just a text\n")
    shards = [str(tmp_path / f"{name}.tar") for name in ("a", "cut", "x")]
    report = prepare_locally(CLIPS, shards, tmp_path / "out", TINY_CODEC)
    found = inspect_dataset(tmp_path / "out")
    assert tuple(found.shard_problems) == report.shard_problems
    assert [(p.shard, p.problem) for p in found.shard_problems] == [
        ("cut", "truncated"),
        ("x", "unreadable"),
    ]
    print_tables(found, Reporter())
    printed, page = capsys.readouterr().out, render(found, [], [])
    for problem in figures(found)["shard_problems"]:
        assert problem.why.split(":")[0] in page
        assert f"│ {problem.shard} " in printed
    assert (figures(found)["truncated_shards"], figures(found)["unreadable_shards"]) == (1, 1)


def test_many_bad_shards_are_named_up_to_twenty_then_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    problems = [ShardProblem(f"bad{n:02d}", "unreadable", "no tar") for n in range(23)]
    say_shard_problems(problems, 30, Reporter())
    text = capsys.readouterr().out
    assert "23 of 30 shards not read to their end" in text
    assert text.count("│ bad") == 20
    assert "and 3 more" in text
    say_shard_problems([], 30, Reporter())
    assert not capsys.readouterr().out


def test_filters_that_found_no_value_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = video(moving(20))
    samples: list[dict[str, Any]] = [
        {"__key__": "a", "mp4": clip, "json": {"matching_score": 0.9}},
        {"__key__": "b", "mp4": clip, "json": {"matching_score": None}},
        {"__key__": "gone", "json": {"status": "failed_to_download"}},
    ]
    write_shard(tmp_path / "0.tar", samples)
    shards = [str(tmp_path / "0.tar")]
    report = prepare_locally(CLIPS, shards, tmp_path / "out", TINY_CODEC)
    text = said(report, capsys)
    assert (
        "2 of 2 samples have no desirable_filtering or shot_boundary_detection: "
        "those filters judged nothing" in text
    )
    assert "1 of 2 samples have no matching_score: that filter let them pass" in text
    assert inspect_dataset(tmp_path / "out").unjudged == report.unjudged

    killed = tmp_path / "killed"
    prepare_locally(CLIPS, shards, killed, TINY_CODEC, stop_after=1)
    prepare_locally(CLIPS, shards, killed, TINY_CODEC)
    assert digests(killed) == digests(tmp_path / "out")

    off = FilterConfig(matching_score_above=None, desirable=False, one_shot=False)
    report = prepare_locally(
        CLIPS.model_copy(update={"filters": off}), shards, tmp_path / "off", TINY_CODEC
    )
    assert report.unjudged == {"samples": 2}
    drop = CLIPS.model_copy(update={"filters": FilterConfig(missing_metadata="drop")})
    report = prepare_locally(drop, shards, tmp_path / "drop", TINY_CODEC)
    assert report.unjudged == {"samples": 2}
    assert report.reasons["missing_metadata"] == 2


def test_a_field_is_absent_exactly_where_its_filter_would_drop_it_as_missing() -> None:
    values = {
        "matching_score": 0.9,
        "desirable_filtering": "desirable",
        "shot_boundary_detection": [["0:00:00.0", "0:00:01.0"]],
    }
    for field in values:
        without = {name: value for name, value in values.items() if name != field}
        assert absent_fields(without, FilterConfig()) == [field]
    assert absent_fields(values, FilterConfig()) == []
