"""`flowreel doctor` on this machine, and on machines that it can only be told of."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline.doctor as doctor
from pipeline.console import Reporter
from pipeline.recipes import load_recipe
from tests.pipeline.command import flowreel
from tests.places import ROOT

TINY = load_recipe("tiny")


@pytest.mark.slow
def test_doctor_finds_this_machine_fit() -> None:
    ended = flowreel("doctor", "--json", "--quiet")
    assert ended.returncode == 0, ended.stdout
    report = json.loads(ended.stdout)
    assert report["fit"]
    checked = {finding["what"] for finding in report["findings"]}
    assert checked >= {
        "torch", "H.264 round trip", "tiny codec", "CPU cores", "free memory", "free disk here",
        "free disk for Ray", "GPUs", "checkout",
    }  # fmt: skip
    table = flowreel("doctor")
    assert table.returncode == 0
    assert "H.264 round trip" in table.stdout


@pytest.mark.slow
def test_doctor_works_without_the_extras_of_developers() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['psutil', 'pytest', 'moto', 'jsonschema'])  # not there\n"
        "from pipeline.cli import main\n"
        "sys.argv = ['flowreel', 'doctor']; sys.exit(main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "free memory" in ended.stdout


def findings(check: object) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in check(TINY)}  # type: ignore[operator]


def test_a_path_with_spaces_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROOT", Path("/home/somebody/my clips/flowreel"))
    finding = findings(doctor._places)["checkout"]
    assert finding.level == "warn"
    assert "my clips" in finding.found
    assert "without" in finding.advice


def test_another_version_than_the_pinned_one_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = importlib.metadata.version("torch").partition("+")[0]
    (tmp_path / "constraints.txt").write_text(f"torch=={torch}\nray==0.1\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    packages = findings(doctor._packages)
    assert packages["torch"].level == "ok"
    assert packages["ray"].level == "warn"
    assert "0.1" in packages["ray"].advice
    assert packages["numpy"].level == "ok", "nothing is pinned for it"


def test_a_missing_package_fails_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "mlflow":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = findings(doctor._packages)["mlflow"]
    assert (finding.level, finding.advice) == ("fail", "run `make setup`")


def test_too_little_room_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEMO_DISK", 2**60)
    monkeypatch.setattr(doctor, "available_memory", lambda: 2**30)
    disk, memory = findings(doctor._disk), findings(doctor._processor_and_memory)
    assert disk["free disk here"].level == "warn"
    assert "GiB free" in disk["free disk here"].advice
    assert (memory["free memory"].level, memory["free memory"].found) == ("warn", "1.0 GiB")


def test_memory_is_read_without_any_package() -> None:
    free = doctor.available_memory()
    assert free is not None
    assert 2**26 < free < 2**50


@pytest.mark.parametrize(
    ("settings", "gpus", "level", "words"),
    [
        ([], 0, "ok", ""),
        ([], 2, "ok", ""),
        ([], 1, "warn", "2 workers"),
        (["train.workers.backend=nccl"], 1, "fail", "wants 2 for training"),
        (["train.workers.backend=nccl"], 2, "ok", ""),
        (["serve.resources.deep_gpus=1", "serve.resources.deep_replicas=3"], 2, "fail", "wants 3"),
        (["prepare.concurrency.encoder_gpus=1"], 0, "fail", "wants 1 for preparing"),
    ],
)
def test_fewer_gpus_than_a_recipe_wants_are_said(
    settings: list[str], gpus: int, level: str, words: str
) -> None:
    two = ["train.workers={strategy: fsdp, count: 2}"]
    finding = doctor.gpu_finding(load_recipe("tiny", two + settings), gpus)
    assert finding.level == level
    assert words in finding.advice


def test_a_check_that_fails_is_a_finding_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_recipe: object) -> object:
        raise ImportError("no such library,\n and more")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor._python))
    assert not doctor.examine(TINY, Reporter(as_json=True, quiet=True))
    first, second = json.loads(capsys.readouterr().out)["findings"]
    assert (first["what"], first["level"], first["found"]) == (
        "broken",
        "fail",
        "no such library, and more",
    )
    assert second["level"] == "ok"
