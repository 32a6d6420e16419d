"""Recipes of whole trainings: each stage is a model that can be built, of the size that is said."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from data_prep.latents.records import Bucket
from flow.codec_factors import SD_FACTORS, WAN_FACTORS, CodecFactors
from flow.flow import FlowModel
from flow.growth import growth_problems
from pipeline.recipes import RECIPES, Recipe, RecipeError, load_recipe
from training.data.batch_sampler import BatchSampler
from training.loop import TrainJob
from training.stage import Stage

NAMES = ("single-gpu", "finetune-lora", "image-3b", "video-7b")


@pytest.fixture(params=NAMES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(request.param)


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    return recipe.curriculum or (Stage(recipe.name, recipe.model, recipe.train),)


def factors(recipe: Recipe) -> CodecFactors:
    return WAN_FACTORS if recipe.model.video else SD_FACTORS


def sampler(recipe: Recipe, stage: Stage, count: int = 5000) -> BatchSampler:
    """Batches of a stage, of a dataset that has so many clips of every bucket."""
    from pathlib import Path

    codec, bucket = factors(recipe), recipe.prepare.bucket
    job = TrainJob(stage.flow, recipe.text, "latents", Path("run"), codec)
    frames = (*bucket.lengths, 1)
    sizes = bucket.all_sizes(codec.space)
    buckets = {Bucket(n, *size): range(count) for n in frames for size in sizes}
    return job.sampler(stage.train, buckets)  # type: ignore[arg-type]


def test_a_comment_says_the_models_true_size(recipe: Recipe) -> None:
    with torch.device("meta"):
        model = FlowModel(recipe.model)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    text = (RECIPES / f"{recipe.name}.yaml").read_text()
    assert f"{billions:.1f} billion parameters" in text


def test_every_stage_computes_a_clip_of_its_longest_bucket(recipe: Recipe) -> None:
    codec = factors(recipe)
    for stage in stages(recipe):
        bucket = recipe.prepare.bucket
        longest = min(bucket.lengths[0], stage.train.batches.frames or bucket.lengths[0])
        grid = codec.grid(*bucket.all_sizes(codec.space)[0])
        with torch.device("meta"):
            model = FlowModel(stage.flow)
            shape = (1, codec.latent_frames(longest), stage.flow.latent_channels, *grid)
            x = torch.empty(shape if stage.flow.video else (shape[0], *shape[2:]))
            text_BJE = torch.empty(1, recipe.text.length, recipe.text.dim)
            z = model.flow(x, text_BJE)[0]
        assert z.numel() == x.numel()


def test_each_stage_grows_out_of_the_one_before(recipe: Recipe) -> None:
    for before, after in pairwise(stages(recipe)):
        assert growth_problems(before.flow, after.flow) == []


def test_every_worker_has_a_share_of_every_batch(recipe: Recipe) -> None:
    for stage in stages(recipe):
        one = sampler(recipe, stage)
        for step in range(60):
            assert one.plan(step).share(0, stage.train.workers.count)


def test_the_single_gpu_has_as_many_clips_in_a_step_as_its_comments_say() -> None:
    recipe = load_recipe("single-gpu")
    one = sampler(recipe, stages(recipe)[-1])
    plans = [one.plan(step) for step in range(300)]
    found = {(p.mode, p.bucket.frames, len(p.ids)) for p in plans if p.mode == "video"}
    assert found == {("video", 33, 8), ("video", 17, 14)}
    assert {len(p.ids) for p in plans if p.mode == "image"} <= {73, 74}
    text = (RECIPES / "single-gpu.yaml").read_text()
    assert re.search(r"tokens: 32768 +# of a step: 8 clips of 33 frames, or 14 of 17", text)


def test_the_curriculum_is_the_papers_order() -> None:
    names = [stage.name for stage in load_recipe("video-7b").curriculum]
    assert names == ["images-384p", "one-second-384p", "five-seconds-384p", "five-seconds-480p"]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{name: a, steps: 3, train: {batch: {frames: 17}}}", "stage 'a': train.batch: Extra"),
        ("{name: a, steps: 3, model: {noise_std: -1}}", "stage 'a': model: noise_std = -1"),
        ("{name: a, steps: 3, train: {steps: 4}}", "leave train.steps out"),
        ("{name: a/b, steps: 3}", "is no name of a stage"),
        ("{name: a, steps: 3}, {name: a, steps: 3}", "two stages are called 'a'"),
    ],
)
def test_a_wrong_stage_is_refused_in_one_line_by_name(stage: str, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        load_recipe("tiny", [f"stages=[{stage}]"])
    assert "\n" not in str(caught.value)
