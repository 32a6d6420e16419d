"""Batches: shares are the batch, captions are mixed at their rates, prompts say what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from flow.config import tiny
from flow.text import HashedText, build_text_encoder
from tests.training.world import SMALL, TEXT, write_dataset
from training.data.batch_sampler import BatchSampler
from training.data.batches import BatchMaker, LatentStore, Prompts
from training.sections import BatchConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data", posterior_noise=True)


SEED = 0


class CountingText(HashedText):
    """The encoder, and what it was asked for."""

    def __init__(self) -> None:
        super().__init__(TEXT)
        self.asked: list[str] = []

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        return super().encode(texts)


def maker(
    root: Path, *, cache_bytes: int = 1 << 30, flow: Any = None, **changes: Any
) -> BatchMaker:
    dataset = LatentDataset(root, "train")
    prompts = Prompts(build_text_encoder(TEXT), flow or tiny(), dataset.info.fps)
    config = BatchConfig(**{**SMALL["batches"], **changes})
    return BatchMaker(LatentStore(dataset, cache_bytes), prompts, config, SEED)


def sampler_of(maker: BatchMaker) -> BatchSampler:
    return BatchSampler(maker.store.dataset.buckets, maker.config, SEED)


def test_shares_put_together_are_the_whole_batch(root: Path) -> None:
    one, two = maker(root), maker(root, cache_bytes=0)
    sampler = sampler_of(one)
    for step in range(8):
        plan = sampler.plan(step)
        whole = one.make(plan, 0, 1)
        shares = [two.make(plan, rank, 2) for rank in range(2)]
        assert torch.equal(whole.x_noisy, torch.cat([s.x_noisy for s in shares]))
        assert torch.equal(whole.text_BJE, torch.cat([s.text_BJE for s in shares]))
        assert whole.prompts == shares[0].prompts + shares[1].prompts


def test_steps_that_drop_the_first_frame_say_extend(root: Path) -> None:
    one = maker(root, caption_dropout=0.0)
    sampler = sampler_of(one)
    for step in range(40):
        plan = sampler.plan(step)
        batch = one.make(plan, 0, 1)
        assert batch.x_noisy.shape[1] == (
            1 if plan.mode == "image" else 2 if plan.drops_first_frame else 3
        )
        assert all(p.startswith("(extend) ") == plan.drops_first_frame for p in batch.prompts)


def test_captions_are_mixed_at_the_configured_rates(root: Path) -> None:
    one = maker(root, first_frame_dropout=0.0)
    sampler = sampler_of(one)
    prompts = [p for step in range(500) for p in one.make(sampler.plan(step), 0, 1).prompts]
    share = {
        "null": sum(p == "" for p in prompts) / len(prompts),
        "original": sum(p.startswith("original") for p in prompts) / len(prompts),
        "synthetic": sum(p.startswith("a ") for p in prompts) / len(prompts),
    }
    assert share == pytest.approx({"null": 0.1, "original": 0.09, "synthetic": 0.81}, abs=0.03)


def test_the_template_says_what_the_model_is_told_to_read(root: Path) -> None:
    flow = tiny(prompt_fps=True, prompt_aspect=True, prompt_noise=True)
    one = maker(root, flow=flow, caption_dropout=1.0, image_ratio=0.5)
    sampler = sampler_of(one)
    texts = {one.make(sampler.plan(s), 0, 1).prompts[0] for s in range(20)}
    assert "Noise Level 300:\nAn image:\n\n\n in a 1:1 aspect ratio.\n" in texts
    assert "Noise Level 300:\nA video with 8 fps:\n\n\n in a 1:1 aspect ratio.\n" in texts
    assert "Noise Level 300:\nA video with 8 fps:\n(extend) \n\n in a 1:1 aspect ratio.\n" in texts


def test_an_image_model_reads_images_whatever_the_mode(root: Path) -> None:
    flow = tiny(prompt_fps=True, video=False)
    one = maker(root, flow=flow, caption_dropout=1.0, image_ratio=0.5, first_frame_dropout=0.0)
    batches = [one.make(sampler_of(one).plan(step), 0, 1) for step in range(4)]
    assert {batch.mode for batch in batches} == {"image", "video"}
    assert {p for batch in batches for p in batch.prompts} == {"An image:\n\n"}
    assert all(batch.x_noisy.dim() == 4 for batch in batches)


def test_a_prompt_names_the_aspect_of_its_bucket(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", clips=0, images=0, more_buckets={(64, 96): 24})
    flow = tiny(prompt_aspect=True)
    one = maker(root, flow=flow, caption_dropout=1.0, image_ratio=0.0, first_frame_dropout=0.0)
    assert set(one.make(sampler_of(one).plan(0), 0, 1).prompts) == {"\n in a 3:2 aspect ratio.\n"}


def test_noise_has_the_configured_strength(root: Path) -> None:
    one = maker(root, first_frame_dropout=0.0)
    plan = sampler_of(one).plan(0)
    two = maker(root, flow=tiny(noise_std=0.6), first_frame_dropout=0.0)
    difference = two.make(plan, 0, 1).x_noisy - one.make(plan, 0, 1).x_noisy
    assert float(difference.std()) == pytest.approx(0.3, rel=0.1)


def test_a_cut_clip_is_the_beginning_of_the_whole_one(root: Path) -> None:
    whole, cut = (
        maker(root, first_frame_dropout=0.0, image_ratio=0.0, frames=frames) for frames in (None, 5)
    )
    long, short = (one.make(sampler_of(one).plan(0), 0, 1) for one in (whole, cut))
    assert long.prompts == short.prompts
    # The noise too: a stream's numbers come frame by frame.
    assert torch.equal(short.x_noisy, long.x_noisy[:, :2])


def test_prompts_kept_without_padding_are_what_the_encoder_made() -> None:
    encoder = build_text_encoder(TEXT)
    prompts = Prompts(encoder, tiny(), 8.0)
    texts = ["", "a red blob", "one two three four five six seven eight", "a red blob"]
    for _ in range(2):
        assert torch.equal(prompts.encode(texts), encoder.encode(texts))
    # 0, 3 and 6 tokens (the most that the encoder gives) of 16 numbers of 4 bytes.
    assert prompts.held_bytes == (0 + 3 + 6) * TEXT.dim * 4


def test_prompts_are_kept_up_to_so_many_bytes() -> None:
    encoder = CountingText()
    prompts = Prompts(encoder, tiny(), 8.0, cache_bytes=4 * 2 * TEXT.dim * 4)
    texts = [f"number {i}" for i in range(10)]
    for text in texts:
        assert torch.equal(prompts.encode([text]), build_text_encoder(TEXT).encode([text]))
        assert prompts.held_bytes <= prompts.cache_bytes
    encoder.asked.clear()
    prompts.encode(texts[6:])
    assert encoder.asked == []
    # What was asked for last stays: 6 is asked for again, so 7 makes room.
    prompts.encode([texts[6]])
    prompts.encode(["number 10"])
    prompts.encode([texts[6]])
    assert encoder.asked == ["number 10"]
    prompts.encode([texts[7]])
    assert encoder.asked == ["number 10", "number 7"]


def test_a_batch_larger_than_the_cache_is_whole() -> None:
    encoder = build_text_encoder(TEXT)
    prompts = Prompts(encoder, tiny(), 8.0, cache_bytes=1)
    texts = [f"number {i}" for i in range(10)]
    assert torch.equal(prompts.encode(texts), encoder.encode(texts))
    assert prompts.held_bytes == 0
