"""`flowreel plan`: recipes become steps, and what is printed is what was planned."""

from __future__ import annotations

import json

import pytest

from pipeline.console import Reporter
from pipeline.recipes import load_recipe
from pipeline.training_plan import KINDS, job_of, plan_training, show_plan
from training.hardware import Hardware


def test_a_recipe_has_a_step_for_every_length_and_size_of_its_resolution() -> None:
    job = job_of(load_recipe("panda-480p"))
    assert {shape.frames for shape in job.videos} == {21, 13, 9, 5}
    # All near 640 x 640 pixels of 16 to a cell.
    assert all(1400 < shape.rows * shape.columns < 1800 for shape in job.videos)
    assert {shape.batch for shape in job.videos} == {8}
    assert job.images is not None
    assert (job.images.frames, job.images.batch) == (1, 64)


def test_the_shipped_7b_fits_eight_h100_only_with_checkpointing() -> None:
    eight = Hardware.of("h100x8")
    none = ["train.memory.checkpointing=none"]
    assert not plan_training(load_recipe("panda-480p", none), eight).fits
    assert plan_training(load_recipe("panda-480p"), eight).fits
    assert plan_training(load_recipe("panda-384p"), eight).fits


def test_what_is_printed_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_training(load_recipe("tiny"), Hardware.of("rtx4090"))
    show_plan(plan, Reporter())
    said = capsys.readouterr().out
    assert "It fits." in said
    assert KINDS["activations"] in said
    assert f"{plan.parameters / 1e6:,.1f} million parameters" in said
    assert json.loads(json.dumps(plan.to_dict()))["memory"]["peak"] == plan.memory.peak
