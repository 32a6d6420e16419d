"""The benchmark of batches reads what it wrote, and says whether its bar holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import ingest
from data_prep.latents.records import Bucket


def test_rows_say_how_often_a_batch_is_made_while_one_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = dataclasses.replace(
        ingest.large_case(400e12), bucket=Bucket(5, 64, 64), clips=8, batch=2, step_s=100.0
    )
    assert ingest.report(case, {"folder": tmp_path / "a"}, steps=2)
    hurried = dataclasses.replace(case, step_s=1e-9)
    assert not ingest.report(hurried, {"folder": tmp_path / "b"}, steps=2)
    printed = capsys.readouterr().out
    assert printed.count("ms a batch") == 4
