"""The batch sampler is a pure function of the step, and noise of the place in the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from data_prep.latents.records import Bucket
from training.data.batch_sampler import (
    BatchSampler,
    BatchSamplerError,
    Mode,
    random_stream,
    uneven,
)
from training.sections import BatchConfig

VIDEO, WIDE, IMAGE = Bucket(9, 64, 64), Bucket(9, 64, 96), Bucket(1, 64, 64)
BUCKETS = {
    VIDEO: [f"v{i}" for i in range(37)],
    WIDE: [f"w{i}" for i in range(3)],
    IMAGE: [f"i{i}" for i in range(20)],
}


def sampler(seed: int = 3, **changes: object) -> BatchSampler:
    values: dict[str, object] = {"batch_size": 4, "image_batch_size": 5}
    config = BatchConfig(**{**values, **changes})  # type: ignore[arg-type]
    return BatchSampler(BUCKETS, config, seed)


def test_a_plan_depends_on_the_step_alone() -> None:
    in_order = [sampler().plan(step) for step in range(200)]
    one = sampler()
    shuffled = {
        int(step): one.plan(int(step)) for step in np.random.default_rng(0).permutation(200)
    }
    assert [shuffled[step] for step in range(200)] == in_order


def test_another_seed_gives_other_batches() -> None:
    assert sampler().plan(0).ids != sampler(seed=4).plan(0).ids


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.37, 1.0])
def test_image_share_is_exact_at_any_time(ratio: float) -> None:
    one = sampler(image_ratio=ratio)
    images = np.cumsum([one.plan(step).mode == "image" for step in range(300)])
    assert np.all(np.abs(images - ratio * np.arange(1, 301)) <= 1)


def test_an_epoch_shows_every_sample_once_or_leaves_out_less_than_a_batch() -> None:
    one = sampler(image_ratio=0.0)
    seen = Counter(i for step in range(9 + 1) for i in one.plan(step).ids)
    assert sum(i.startswith("v") for i in seen) == 36
    assert all(count == 1 for i, count in seen.items() if i.startswith("v"))


def test_a_bucket_smaller_than_a_batch_still_fills_one() -> None:
    one = sampler(image_ratio=0.0)
    plans = [p for p in (one.plan(step) for step in range(40)) if p.bucket == WIDE]
    assert plans
    assert all(len(p.ids) == 4 and set(p.ids) == {"w0", "w1", "w2"} for p in plans)


def test_a_batch_never_mixes_buckets_and_images_never_drop_their_only_frame() -> None:
    one = sampler()
    for step in range(200):
        plan = one.plan(step)
        assert {i[0] for i in plan.ids} == {{VIDEO: "v", WIDE: "w", IMAGE: "i"}[plan.bucket]}
        assert not (plan.mode == "image" and plan.drops_first_frame)


def test_first_frames_are_dropped_at_the_configured_rate() -> None:
    one = sampler(image_ratio=0.0)
    assert 0.2 < np.mean([one.plan(step).drops_first_frame for step in range(1000)]) < 0.3


def test_workers_take_disjoint_shares_in_order() -> None:
    plan = sampler().plan(0)
    places = [list(plan.share(rank, 2)) for rank in range(2)]
    assert places == [[0, 1], [2, 3]]
    with pytest.raises(BatchSamplerError, match="4 does not divide among 3"):
        plan.share(0, 3)


def test_images_come_from_clips_where_there_are_no_images() -> None:
    one = BatchSampler({VIDEO: BUCKETS[VIDEO]}, BatchConfig(image_ratio=0.5), seed=0)
    assert {one.plan(step).mode for step in range(10)} == {"image", "video"}


def test_missing_clips_are_said_by_name() -> None:
    with pytest.raises(BatchSamplerError, match="dataset has no video samples"):
        BatchSampler({IMAGE: ["i"]}, BatchConfig(image_ratio=0.5), seed=0)


def test_random_streams_do_not_touch() -> None:
    draws = {
        tuple(random_stream(1, purpose, step, place).random(4))
        for purpose in ("noise", "caption")
        for step in range(3)
        for place in range(3)
    }
    assert len(draws) == 18
    again = random_stream(1, "noise", 2, 1).random(4)
    assert tuple(again) in draws


def epoch_of_texts(one: BatchSampler, mode: Mode, epoch: int) -> list[tuple[Bucket, list[str]]]:
    """Every batch of an epoch, put together from ids that are all held in memory."""
    size = {"image": one.config.image_batch_size, "video": one.config.batch_size}[mode]
    batches = []
    for bucket, ids in sorted(one._buckets[mode].items()):
        rng = random_stream(one.seed, "order", epoch, crc32(repr((mode, tuple(bucket))).encode()))
        order = np.concatenate([rng.permutation(len(ids)) for _ in range(-(-size // len(ids)))])
        for start in range(0, len(order) - size + 1, size):
            batches.append((bucket, [ids[i] for i in order[start : start + size]]))
    shuffle = random_stream(one.seed, "order", epoch, crc32(mode.encode()) | 1 << 40)
    return [batches[i] for i in shuffle.permutation(len(batches))]


def test_batches_come_as_from_an_epoch_held_as_texts() -> None:
    one = sampler()
    modes: tuple[Mode, ...] = ("image", "video")
    for mode in modes:
        steps = [step for step in range(200) if one.plan(step).mode == mode]
        planned = [(one.plan(step).bucket, list(one.plan(step).ids)) for step in steps]
        expected = [batch for epoch in range(9) for batch in epoch_of_texts(one, mode, epoch)]
        assert planned[: len(expected)] == expected[: len(planned)]
        assert min(len(planned), len(expected)) > one.batches_per_epoch(mode)


def tokens_of(bucket: Bucket) -> int:
    return (1 + bucket.frames // 4) * (bucket.height // 16) * (bucket.width // 16)


def budgeted(**changes: Any) -> BatchSampler:
    config = BatchConfig(**{"tokens": 400, "image_tokens": 160, "multiple_of": 2, **changes})
    return BatchSampler(BUCKETS, config, 3, tokens_of)


def test_a_budget_of_tokens_fills_every_bucket_to_it_and_not_past() -> None:
    one = budgeted()
    sizes = {(p.mode, p.bucket): len(p.ids) for p in (one.plan(step) for step in range(200))}
    # 48 and 72 tokens a clip, 16 an image; even numbers of them.
    assert sizes == {("video", VIDEO): 8, ("video", WIDE): 4, ("image", IMAGE): 10}


def test_clips_cut_shorter_are_more_in_a_budget() -> None:
    plan = next(p for p in (budgeted(frames=5).plan(s) for s in range(50)) if p.bucket == VIDEO)
    assert (plan.frames, len(plan.ids)) == (5, 12)


def test_a_budget_too_small_for_a_clip_is_refused_with_what_it_takes() -> None:
    with pytest.raises(BatchSamplerError, match=r"tokens is 90, .* bucket 9x64x64 have 96"):
        budgeted(tokens=90)


def test_views_are_what_a_run_draws() -> None:
    for one in (sampler(), budgeted()):
        steps = 2000
        seen = Counter(i[0] for step in range(steps) for i in one.plan(step).ids)
        views = {v.bucket: v for v in one.views(steps)}
        for bucket, letter in ((VIDEO, "v"), (WIDE, "w"), (IMAGE, "i")):
            drawn = seen[letter] / len(BUCKETS[bucket])
            assert views[bucket].views == pytest.approx(drawn, rel=0.05)


def test_small_and_overdrawn_buckets_are_said_with_counts() -> None:
    buckets = {VIDEO: [f"v{i}" for i in range(400)], WIDE: ["w0", "w1", "w2"]}
    one = BatchSampler(buckets, BatchConfig(batch_size=8, image_ratio=0.0), 0)
    lines = uneven(one.views(100))
    assert len(lines) == 2
    assert "bucket 9x64x96 holds 3 clips, and a batch of it 8" in lines[0]
    assert "clips of bucket 9x64x96 (3) are seen 5.2 times each, clips in general 2.0" in lines[1]
    even = BatchSampler({VIDEO: buckets[VIDEO]}, BatchConfig(batch_size=8, image_ratio=0.0), 0)
    assert uneven(even.views(100)) == []
