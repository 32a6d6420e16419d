"""What is shown of a run: the same however it is read, and nothing odd without a terminal."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli import arguments
from pipeline.console import Reporter
from pipeline.watch import RunView, training_shown, watch
from tests.training.world import small_config, small_request
from training.record.history import HISTORY_NAME, History
from training.run import CONFIG_NAME, FINISHED_NAME

NOW_S = 1e9 + 400


def lines(*steps: int, **values: Any) -> list[dict[str, Any]]:
    """Lines of a history: a step a second, every third on images."""
    return [
        {
            "step": step,
            "mode": "video" if step % 3 else "image",
            "loss_nats_per_dim": 1 + 1 / (1 + step),
            "noise_floor": 0.25,
            "skipped": int(step == 7),
            "time_s": 1e9 + step,
            "step_s": 2.0,
            "data_wait_s": 0.5,
            "tokens_per_s": 512.0,
            **values,
        }
        for step in steps
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 300 steps that is at its 200th."""
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"all": {"steps": 300}}))
    history = History(tmp_path / HISTORY_NAME, 0)
    history.append(lines(*range(100)))
    measured = {"held_out_nats_per_dim": 0.5, "held_out/9x64x64": 0.5, "held_out/1x64x64": 0.75}
    history.append(lines(100, **measured, rss_bytes=1_500_000_000))
    history.append(lines(*range(101, 200)))
    return tmp_path


def seen(view: RunView) -> dict[str, str]:
    view.refresh()
    return dict(view.rows(NOW_S))


def test_a_run_is_said_in_words(run: Path) -> None:
    rows = seen(RunView(run))
    assert rows["state"] == "last line 3 min ago"
    assert rows["step"] == "200/300 (67%), 3 min left"
    assert rows["video loss"].startswith("1.005 nats/dim, 0.755 over the floor  █")
    assert rows["image loss"].startswith("1.006 nats/dim, 0.756 over the floor  █")
    assert rows["held-out loss"] == "0.500 nats/dim, 0.250 over the floor, after step 101"
    assert rows["by size"] == "1x64x64 0.750, 9x64x64 0.500"
    assert rows["speed"] == "512 tokens/s, 2.00 s a step"
    assert rows["data wait"] == "25% of a step"
    assert rows["memory"] == "1.5 GB of the first worker"
    assert rows["skipped"] == "1 steps"
    assert rows["checkpoint"] == "none yet"
    (run / "checkpoints/step_00000150").mkdir(parents=True)
    (run / "checkpoints/step_00000150/complete.json").write_text("{}")
    (run / FINISHED_NAME).write_text('{"steps": 300}')
    rows = seen(RunView(run))
    assert rows["checkpoint"].startswith("step 150, ")
    assert rows["state"] == "finished"


def test_a_history_read_as_it_grows_says_what_the_whole_one_says(run: Path) -> None:
    view, history = RunView(run), History(run / HISTORY_NAME, 0)
    assert seen(view) == {"state": "no step yet"}
    for step in range(200):
        history.append(lines(step))
        if step % 7 == 0:
            view.refresh()
    assert seen(view) == seen(RunView(run))


def test_steps_that_a_resumed_run_takes_again_are_shown_once(run: Path) -> None:
    view = RunView(run)
    view.refresh()
    resumed = History(run / HISTORY_NAME, 195)
    resumed.append(lines(*range(195, 198)))
    rows = seen(view)
    assert rows["step"].startswith("198/300")
    assert rows["video loss"] == seen(RunView(run))["video loss"]


def test_a_terminal_is_kept_up_to_date_and_anything_else_is_told_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / FINISHED_NAME).write_text('{"steps": 300}')
    terminal = Reporter()
    shown = io.StringIO()
    terminal._errors = Console(file=shown, force_terminal=True, width=120)
    watch(run, terminal)
    assert "over the floor" in shown.getvalue()
    assert not capsys.readouterr().out
    watch(run, Reporter())
    out, err = capsys.readouterr()
    assert "over the floor" in out
    assert "\x1b" not in out + err
    watch(run, Reporter(as_json=True))
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_of_a_run_in_stages_the_newest_one_is_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "staged"
    for name in ("01-images", "02-video"):
        shutil.copytree(run, out / "stages" / name, ignore=shutil.ignore_patterns("staged"))
    step = out / "stages" / "02-video" / "checkpoints" / "step_00000150"
    step.mkdir(parents=True)
    (step / "complete.json").write_text("{}")
    # As the command takes it, before the first stage has left a history of the whole.
    watch(arguments.run_folder(out), Reporter())
    said = capsys.readouterr().out
    assert "02-video" in said
    assert "step 150" in said


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().live(lambda: "a picture") as is_live:
        assert not is_live
    assert capsys.readouterr() == ("", "")


def test_train_watched_shows_the_panel_in_a_terminal_and_lines_elsewhere(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = small_request(run, run, small_config(steps=300))
    with training_shown(request, Reporter(), "training", watch=True) as progress:
        assert progress is not None
        progress(lines(298, 299))
    assert capsys.readouterr() == ("", "  training 300/300 1.003 nats/dim\n")
    terminal, shown = Reporter(), io.StringIO()
    terminal._errors = Console(file=shown, force_terminal=True, width=120)
    with training_shown(request, terminal, "training", watch=True) as progress:
        assert progress is None
    assert "200/300" in shown.getvalue()
