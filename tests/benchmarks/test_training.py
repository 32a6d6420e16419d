"""The plain step and ours are one step; a model's rows are printed whole."""

from __future__ import annotations

import pytest
import torch

from benchmarks import training
from benchmarks.training import AGREE, Case, cases, our_step, plain_step

CASE = Case("tiny", next(case.flow for case in cases() if case.name == "small"), 1, 3, (2, 3))


def test_the_plain_step_and_ours_have_the_same_losses() -> None:
    ours, plain = our_step(CASE, "fp32")(), plain_step(CASE)()
    assert min(plain) > 0
    assert ours == pytest.approx(plain, rel=AGREE)


def test_rows_say_how_fast_and_how_far_from_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    peak = training.matmul_peak(torch.float32, side=256)
    assert training.report(CASE, {"fp32": peak}, rounds=1) > 0
    printed = capsys.readouterr().out
    assert "losses agree to" in printed
    assert printed.count("MFU") == 2
