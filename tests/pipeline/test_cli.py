"""The command line as a user meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

COMMANDS = (
    "demo", "prepare", "train-codec", "train", "sample", "score", "evaluate", "serve", "import-weights", "submit", "doctor",
)  # fmt: skip


def flowreel(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        check=False,
    )


def refused(*arguments: str) -> str:
    """The single line of a command that refuses its arguments."""
    done = flowreel(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flowreel: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_names_every_command() -> None:
    done = flowreel("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_an_unknown_recipe_key_exits_2_with_one_line(tmp_path: Path) -> None:
    line = refused("demo", "--set", "train.stepz=5", "--out", str(tmp_path))
    assert "train.stepz = 5" in line
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_missing_paths_are_named(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert "no-shards" in refused("prepare", "--shards", "no-shards", "--out", out)
    assert "no-model" in refused("sample", "no-model", "--prompt", "x", "--out", f"{out}.mp4")
    assert "no-model" in refused("score", "no-model", "no.mp4", "--prompt", "x")
    assert "no-model" in refused("evaluate", "no-model", "--data", "no-data")
    assert "no-recipe" in refused("submit", "no-recipe", "--address", "http://127.0.0.1:1")
    assert "no-data" in refused("train", "--data", "no-data", "--out", out)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_only_captions_needs_an_output_to_caption(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    line = refused("prepare", "--only", "captions", "--out", out)
    assert "no such folder" in line
    done = flowreel("prepare", "--only", "latents", "--out", out)
    assert done.returncode == 2
    assert "allowed: captions" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_an_unknown_codec_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"\0" * 10240)
    out = tmp_path / "out"
    line = refused("prepare", "--shards", str(tmp_path), "--codec", "nonsense", "--out", str(out))
    assert "unknown codec 'nonsense'" in line
    assert not out.exists()


def test_train_codec_names_an_unknown_setting(tmp_path: Path) -> None:
    line = refused("train-codec", "--out", str(tmp_path / "codec"), "--set", "learning_rat=1")
    assert "did you mean learning_rate?" in line
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_said() -> None:
    address = ("--address", "http://127.0.0.1:1")
    assert "127.0.0.1:1" in refused("submit", "tiny", *address, "--", "--out", "/nowhere")


def test_a_job_without_a_place_for_its_results_is_refused() -> None:
    assert "--out" in refused("submit", "tiny", "--address", "http://127.0.0.1:1")


@pytest.mark.parametrize("command", ["demo", "sample", "train"])
def test_help_texts_state_defaults_and_units(command: str) -> None:
    text = flowreel(command, "--help").stdout
    assert "default" in text


def test_doctor_finds_this_machine_fit() -> None:
    done = flowreel("doctor")
    assert done.returncode == 0, done.stdout
    for what in ("torch", "H.264 round trip", "tiny codec", "CPU cores"):
        assert what in done.stdout
