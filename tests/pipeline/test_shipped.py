"""The weights that ship: what lies beside them, and that commands use them by default."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flowreel
from data_prep.world.judge import judge
from data_prep.world.prompts import prompts
from media.read import read_video
from pipeline.evaluation.prompt_following import shares
from pipeline.evaluation.samples import Sampling, make_videos
from pipeline.recipes import load_recipe
from pipeline.shipped import SHIPPED_MODEL, NoShippedModelError, recipe_beside, shipped_model
from serving.loading import load
from tests.pipeline import command

PROMPT = "A large red circle moves left slowly over a dark smooth background."
MOST_BYTES = 40_000_000


def test_they_are_small_and_say_how_they_were_made() -> None:
    files = [path for path in SHIPPED_MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".md"}
    made = json.loads((SHIPPED_MODEL / "made.json").read_text())
    recipe = load_recipe(recipe_beside(SHIPPED_MODEL))
    assert made["steps"] == recipe.train.steps
    assert made["command"].startswith("flowreel demo --recipe shapes")
    assert len(made["dataset_samples"]) == 16
    evaluation = json.loads((SHIPPED_MODEL / "evaluation.json").read_text())
    assert 0 < evaluation["seen.colour"] <= 1
    assert evaluation["about"]["model"] == SHIPPED_MODEL.name


def test_a_recipe_beside_them_is_the_recipe_of_that_name() -> None:
    beside, named = load_recipe(recipe_beside(SHIPPED_MODEL)), load_recipe("shapes")
    assert beside.model == named.model
    assert beside.train.trajectory() == named.train.trajectory()
    assert beside.sampler == named.sampler


def test_sample_uses_them_where_no_model_is_named(tmp_path: Path) -> None:
    made = []
    for name, model in (("none.mp4", ()), ("named.mp4", (str(SHIPPED_MODEL),))):
        out = tmp_path / name
        ended = command.flowreel("sample", *model, "-p", PROMPT, "--seed", "3", "--out", str(out))
        assert ended.returncode == 0, ended.stderr
        made.append(out.read_bytes())
    assert made[0] == made[1]
    assert len(read_video(tmp_path / "none.mp4").frames) == flowreel.load().video.num_frames


def test_python_uses_them_too() -> None:
    one, two = flowreel.load(), flowreel.load(SHIPPED_MODEL)
    assert np.array_equal(one.sample(PROMPT, seed=3).frames, two.sample(PROMPT, seed=3).frames)


def test_a_copy_without_them_says_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shipped.SHIPPED_MODEL", Path("/nowhere"))
    with pytest.raises(NoShippedModelError, match="name a model folder, such as"):
        shipped_model()


def test_they_draw_what_they_are_told() -> None:
    """Far above chance on a few prompts; `flowreel evaluate` measures it."""
    recipe = load_recipe(recipe_beside(SHIPPED_MODEL))
    loaded = load(SHIPPED_MODEL, sampling=recipe.sampler)
    asked = prompts(24, seed=7_000, kinds=recipe.world.kinds)
    guidance = recipe.serve.limits.default_guidance
    videos = make_videos(loaded, [p.text for p in asked], Sampling(guidance, seed=7_000))
    read = shares(asked, [judge(video, fps=loaded.facts.fps) for video in videos])
    assert read["colour"].value >= 0.85
    assert read["shape"].value >= 0.6
    assert read["motion"].value >= 0.5
