"""What is shown, where, and how much of it: quiet, JSON, and progress with the time left."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pipeline.console import PlainProgress, Reporter


def say_everything(reporter: Reporter) -> None:
    reporter.say("on the way")
    reporter.outcome("outcome [red] of a path")
    reporter.table("a table with a title longer than its rows", ["name", "count"], [["a [b]", "1"]])
    with reporter.progress("working") as update:
        update(1, 2, "things")
    reporter.document({"count": 1, "loss": float("inf")})


def test_outcomes_and_words_go_to_standard_output_and_progress_beside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say_everything(Reporter())
    out, err = capsys.readouterr()
    assert "on the way" in out
    assert "outcome [red] of a path" in out, "a name in brackets is no markup"
    assert "a [b]" in out
    assert "{" not in out
    assert err == "  working 1/2 things\n"


def test_quiet_leaves_only_outcomes(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Reporter(quiet=True))
    out, err = capsys.readouterr()
    assert "on the way" not in out
    assert "outcome" in out
    assert "a table with a title longer than its rows\n" in out
    assert not err


def test_json_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Reporter(as_json=True))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"count": 1, "loss": None}
    for words in ("on the way", "outcome", "a table", "working 1/2"):
        assert words in err
    say_everything(Reporter(as_json=True, quiet=True))
    out, err = capsys.readouterr()
    assert json.loads(out)["count"] == 1
    assert not err


def test_a_console_of_ones_own_takes_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(Reporter(console=Console(quiet=True)))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, shown = Reporter(), io.StringIO()
    monkeypatch.setattr(
        reporter, "_errors", Console(file=shown, force_terminal=True, width=120, markup=False)
    )
    with reporter.progress("training") as update:
        for step in (0, 1, 2):
            update(step, 100, "0.5 [nats]/dim")
    text = shown.getvalue()
    assert "training" in text
    assert "2/100" in text
    assert "0.5 [nats]/dim" in text
    assert "0:00" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_words_that_tell_the_time_themselves_are_one_line_of_any_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    reporter, shown = Reporter(), io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width, markup=False, color_system=None)
    monkeypatch.setattr(reporter, "_errors", console)
    words = "shards, 400 samples, 39.9/s, about 2 min left, 399 kept, 0 dropped, 1 failed"
    with reporter.progress("preparing", timed=False) as update:
        update(3, 10, words)
    last = shown.getvalue().rstrip().split("\x1b[2K")[-1].split("\n")[0]
    assert "preparing 3/10 shards, 400" in last
    assert len(last) <= width
    assert (words in last) == (width == 200)


def test_the_time_left_counts_only_what_this_run_did() -> None:
    lines: list[str] = []
    clock = iter([0.0, 30.0, 35.0, 60.0]).__next__
    progress = PlainProgress("training", lambda text, **_: lines.append(text), clock)
    progress.update(600, 1000, "a")  # resumed here
    progress.update(700, 1000, "b")
    progress.update(710, 1000, "too soon")
    progress.update(1000, 1000, "c")
    assert lines == [
        "  training 600/1000 a",
        "  training 700/1000 b, 2 min left",
        "  training 1000/1000 c",
    ]


def test_progress_without_a_total_says_the_count() -> None:
    lines: list[str] = []
    progress = PlainProgress("reading", lambda text, **_: lines.append(text), lambda: 0.0)
    progress.update(3, None, "samples")
    assert lines == ["  reading 3 samples"]
