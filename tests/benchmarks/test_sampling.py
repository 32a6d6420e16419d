"""The sampling benchmark: what it calls a bar, and the trained model held against it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sampling
from benchmarks.sampling import Bar, Row, measure, verdicts
from benchmarks.sampling_case import TRAINED, Case, Sampler, load_case, samplers
from benchmarks.sampling_figures import draw, residual_curve
from tests.flow.models import randn, texts, tiny_model
from tests.places import ROOT, TRAINED_SMALL

GOOD = Row("default", 60.0, 3.5, 0.1, 0.1, 2e-2, 0.2, 0.2, 0.1)
SLOW = dataclasses.replace(GOOD, wall_s=1.0)


def _case() -> Case:
    model = tiny_model(torch.float32)
    text, null = texts(model, 2, dtype=torch.float32)
    noise = randn(2, 3, 4, 2, 3, seed=1, dtype=torch.float32)
    case = Case(model.flow, text, null, noise, torch.zeros(2, 3, 2, 3, 4))
    exact = Sampler("sequential", {"schedule": "sequential"})
    measure(case, [exact], rounds=1)
    case.exact = torch.cat([exact.videos[0], exact.videos[1]])
    return case


def test_the_bar_is_met_only_when_every_condition_holds() -> None:
    assert all(holds for _, holds in verdicts(GOOD, SLOW, SLOW, Bar()))
    for worse in (
        {"rms": 3e-2},
        {"max_abs": 0.4},
        {"iterations": 71.0},
        {"evaluations": 4.1},
        {"rms": float("nan")},
    ):
        checks = verdicts(dataclasses.replace(GOOD, **worse), SLOW, SLOW, Bar())
        assert [holds for _, holds in checks].count(False) == 1
    barely = dataclasses.replace(GOOD, wall_s=0.16)
    assert [holds for _, holds in verdicts(GOOD, barely, SLOW, Bar())].count(False) == 1
    assert [holds for _, holds in verdicts(GOOD, SLOW, barely, Bar())].count(False) == 1


def test_rows_measure_error_and_certificate_of_every_sampler() -> None:
    case = _case()
    rows = measure(case, samplers(case), rounds=1)
    by_name = {row.name: row for row in rows}
    assert by_name["sequential"].evaluations == 1
    assert by_name["sequential"].rms < 1e-6
    assert all(row.r_max < 0.2 and row.wall_s > 0 for row in rows)
    assert len(sampling.table(rows, rows[0])) == 1 + len(rows)


def test_residual_of_a_block_falls_with_every_few_sweeps() -> None:
    curve = residual_curve(_case(), block=6, sweeps=40)
    assert len(curve) == 6
    assert 10 * curve[-1] < curve[0]


def test_a_folder_without_a_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        sampling.main(["--model", str(tmp_path)])


def test_the_default_meets_the_bar_on_the_trained_model_in_all_but_time() -> None:
    """Times are the machine's; errors and counts are the code's, the same wherever it runs."""
    assert TRAINED.samefile(TRAINED_SMALL)
    case = load_case(TRAINED)
    (row,) = measure(case, [Sampler("default", {})], rounds=1)
    bar = Bar()
    assert row.rms <= bar.rms
    assert row.max_abs <= bar.max_abs
    assert row.iterations <= bar.iterations
    assert row.evaluations <= bar.evaluations


def test_imports_neither_ray_nor_diffusers() -> None:
    code = (
        "import sys, benchmarks.sampling\n"
        "bad = {'ray', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_figures_are_drawn(tmp_path: Path) -> None:
    paths = draw(_case(), tmp_path, repeats=1)
    assert all(path.stat().st_size > 1000 for path in paths)
