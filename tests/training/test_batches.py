"""Batches: shares of a batch are the batch, captions are mixed at the configured rates, prompts
say what was done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from flow.text import build_text_encoder
from tests.training.world import TEXT, small_config, small_flow, write_dataset
from training.batches import (
    BatchMaker,
    LatentStore,
    Prompts,
    aspect_name,
)
from training.loop import make_sampler


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data", posterior_noise=True)


def maker(root: Path, *, cache_bytes: int = 1 << 30, flow: Any = None, **config: Any) -> BatchMaker:
    flow = flow or small_flow()
    dataset = LatentDataset(root, "train")
    prompts = Prompts(build_text_encoder(TEXT), flow, dataset.info.fps)
    store = LatentStore(dataset, cache_bytes)
    return BatchMaker(store, prompts, small_config(**config), flow, dataset.info.convention)


def test_shares_put_together_are_the_whole_batch(root: Path) -> None:
    one, two = maker(root), maker(root, cache_bytes=0)
    sampler = make_sampler(one.config, one.store.dataset)
    for step in range(8):
        plan = sampler.plan(step)
        whole = one.make(plan, 0, 1)
        shares = [two.make(plan, rank, 2) for rank in range(2)]
        assert torch.equal(whole.x_noisy, torch.cat([s.x_noisy for s in shares]))
        assert torch.equal(whole.text_BLD, torch.cat([s.text_BLD for s in shares]))
        assert whole.prompts == shares[0].prompts + shares[1].prompts


def test_steps_that_drop_the_first_frame_say_extend(root: Path) -> None:
    one = maker(root, caption_dropout=0.0)
    sampler = make_sampler(one.config, one.store.dataset)
    for step in range(40):
        plan = sampler.plan(step)
        batch = one.make(plan, 0, 1)
        assert batch.x_noisy.shape[1] == (
            1 if plan.mode == "image" else 2 if plan.drop_first else 3
        )
        assert all(p.startswith("(extend) ") == plan.drop_first for p in batch.prompts)


def test_captions_are_mixed_at_the_configured_rates(root: Path) -> None:
    one = maker(root, drop_first_frame=0.0)
    sampler = make_sampler(one.config, one.store.dataset)
    prompts = [p for step in range(500) for p in one.make(sampler.plan(step), 0, 1).prompts]
    share = {
        "null": sum(p == "" for p in prompts) / len(prompts),
        "original": sum(p.startswith("original") for p in prompts) / len(prompts),
        "synthetic": sum(p.startswith("a ") for p in prompts) / len(prompts),
    }
    assert share == pytest.approx({"null": 0.1, "original": 0.09, "synthetic": 0.81}, abs=0.03)


def test_the_template_says_what_the_model_is_told_to_read(root: Path) -> None:
    flow = small_flow(prompt_fps=True, prompt_aspect=True, prompt_noise=True)
    one = maker(root, flow=flow, caption_dropout=1.0, image_ratio=0.5)
    sampler = make_sampler(one.config, one.store.dataset)
    texts = {one.make(sampler.plan(s), 0, 1).prompts[0] for s in range(20)}
    assert "Noise Level 300:\nAn image:\n\n\n in a 1:1 aspect ratio.\n" in texts
    assert "Noise Level 300:\nA video with 8 fps:\n\n\n in a 1:1 aspect ratio.\n" in texts
    assert "Noise Level 300:\nA video with 8 fps:\n(extend) \n\n in a 1:1 aspect ratio.\n" in texts


def test_noise_has_the_configured_strength(root: Path) -> None:
    one = maker(root, drop_first_frame=0.0)
    plan = make_sampler(one.config, one.store.dataset).plan(0)
    two = maker(root, flow=small_flow(noise_std=0.6), drop_first_frame=0.0)
    difference = two.make(plan, 0, 1).x_noisy - one.make(plan, 0, 1).x_noisy
    assert float(difference.std()) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("size", "name"), [((64, 64), "1:1"), ((96, 64), "2:3"), ((480, 854), "16:9")]
)
def test_aspects_have_their_nearest_name(size: tuple[int, int], name: str) -> None:
    assert aspect_name(*size) == name
