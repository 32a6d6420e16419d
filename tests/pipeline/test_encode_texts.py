"""`flowreel prepare --only text`: all that a recipe trains on, in every stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.texts.read import open_texts
from data_prep.texts.records import TextSettings
from data_prep.texts.run import prepare_texts
from flow.text import TextSpec
from pipeline.console import Reporter
from pipeline.encode_texts import encode_texts, runs_on_ray, texts_to_do
from pipeline.recipes import Recipe, load_recipe
from tests.flow.tiny_t5 import byte_t5
from tests.pipeline.command import flowreel
from tests.training.world import write_dataset
from training.data.texts import find_texts, prompt_forms


def staged() -> Recipe:
    """Two stages that say another noise level each."""
    recipe = load_recipe("tiny", ["model.prompt_noise=true"])
    stages = [
        {"name": name, "steps": 2, "model": {"noise_std": sigma}}
        for name, sigma in (("first", 0.5), ("second", 0.25))
    ]
    return Recipe.model_validate({**recipe.model_dump(mode="json"), "stages": stages})


def test_every_stage_of_a_recipe_finds_its_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, recipe = write_dataset(tmp_path / "data"), staged()
    settings, left = texts_to_do(recipe, root)
    assert (left, runs_on_ray(settings)) == (1, False)
    report = encode_texts(settings, root, Reporter())
    assert texts_to_do(recipe, root) == (settings, 0)
    assert f"{report.prompts:,} prompts of " in capsys.readouterr().out
    assert len(recipe.curriculum) == 2
    for stage in recipe.curriculum:
        found, line = find_texts(recipe.text, stage.flow, stage.train.batches, root)
        assert found is not None, line
    found, line = find_texts(recipe.text, recipe.model, recipe.train.batches, root)
    assert found is None, "no stage has the recipe's own noise level"


@pytest.mark.slow
def test_a_t5_on_ray_leaves_what_one_process_leaves(tmp_path: Path) -> None:
    roots = [write_dataset(tmp_path / name, clips=8, images=4) for name in ("ray", "here")]
    spec = TextSpec("t5", 24, 64, path=str(byte_t5(tmp_path / "t5", width=64)))
    values = {**spec.to_dict(), "length": 24}
    ended = flowreel(
        "prepare", "--only", "text", "--out", str(roots[0]), "--json",
        *(f"--set=text.{name}={value}" for name, value in values.items()),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    recipe = load_recipe("tiny")
    forms = prompt_forms(recipe.model, recipe.train.batches, roots[1])
    settings = texts_to_do(recipe.model_copy(update={"text": spec}), roots[1])[0]
    assert settings == replace(settings, forms=forms)
    here = prepare_texts(roots[1], settings)
    assert (report["prompts"], report["encoded_now"]) == (here.prompts, here.encoded_now)
    one, other = (open_texts(root, spec, forms) for root in roots)
    prompts = every_prompt(settings)
    assert torch.allclose(one.encode(prompts), other.encode(prompts), rtol=2**-10, atol=1e-5)


def every_prompt(settings: TextSettings) -> list[str]:
    captions = ["", "original red", "a blue blob"]
    return sorted(settings.prompts("9x64x64", captions))
