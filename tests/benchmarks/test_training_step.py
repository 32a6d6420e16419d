"""The benchmark of a training step: what it prints, and that bf16's gradients are fp32's."""

from __future__ import annotations

import sys

import pytest

from benchmarks import training_step


def test_a_small_run_prints_speed_and_agreement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["training_step", "--rounds", "1"])
    monkeypatch.setattr(training_step, "LENGTHS", (16,))
    training_step.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:3]] == ["step of clips", "step of images"]
    off = float(lines[3].split()[6])
    assert 0 < off < 0.1
    assert lines[4].startswith("attention over 16 places, with gradients: fp32 ")
