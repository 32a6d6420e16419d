"""`flowreel plan`: recipes become steps, and what is printed is what was planned."""

from __future__ import annotations

import json

import pytest

from pipeline.console import Reporter
from pipeline.recipes import load_recipe
from pipeline.training_plan import KINDS, job_of, plan_training, show_plan
from training.hardware import Hardware
from training.stage import Stage


def test_a_recipe_has_a_step_for_every_length_and_size_of_its_resolution() -> None:
    recipe = load_recipe("panda-480p")
    job = job_of(recipe, Stage(recipe.name, recipe.model, recipe.train))
    assert {shape.frames for shape in job.videos} == {21, 13, 9, 5}
    # All near 640 x 640 pixels of 16 to a cell.
    assert all(1400 < shape.rows * shape.columns < 1800 for shape in job.videos)
    assert {shape.batch for shape in job.videos} == {8}
    assert job.images is not None
    assert (job.images.frames, job.images.batch) == (1, 64)


def test_the_shipped_7b_fits_eight_h100_only_with_checkpointing() -> None:
    eight = Hardware.of("h100x8")
    none = ["train.memory.checkpointing=none"]
    for name, overrides, fits in (
        ("panda-480p", none, False),
        ("panda-480p", [], True),
        ("panda-384p", [], True),
    ):
        assert plan_training(load_recipe(name, overrides), eight)[name].fits == fits


def test_a_curriculum_is_planned_stage_by_stage_by_its_budget_of_tokens() -> None:
    recipe = load_recipe("single-gpu")
    plans = plan_training(recipe, Hardware.of("rtx4090"))
    assert [*plans] == [stage.name for stage in recipe.curriculum]
    # 441 or 448 tokens of each of nine latent frames, 32,768 of them.
    last = job_of(recipe, recipe.curriculum[-1])
    assert {shape.batch for shape in last.videos if shape.frames == 9} == {8}
    assert job_of(recipe, recipe.curriculum[0]).videos == ()
    assert all(plan.fits for plan in plans.values())


def test_the_papers_curriculum_fits_96_h200() -> None:
    plans = plan_training(load_recipe("video-7b"), Hardware.of("h200x96"))
    assert all(plan.fits for plan in plans.values())


def test_what_is_printed_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_training(load_recipe("tiny"), Hardware.of("rtx4090"))["tiny"]
    show_plan(plan, Reporter())
    said = capsys.readouterr().out
    assert "It fits." in said
    assert KINDS["activations"] in said
    assert f"{plan.parameters / 1e6:,.1f} million parameters" in said
    assert json.loads(json.dumps(plan.to_dict()))["memory"]["peak"] == plan.memory.peak
