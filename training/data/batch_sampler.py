"""Which samples a step trains on: a pure function of (seed, configuration, step).

Nothing here has state, so only the step number is checkpointed and a run resumes exactly on any
number of workers. All workers get the same plan and take their slices of it; randomness inside a
sample comes from (seed, step, global place in the batch), so that many workers see what one would.
Knows nothing of tensors, models or files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.latents.records import Bucket
from flowreel.errors import FlowreelError
from training.sections import BatchConfig

Mode = Literal["image", "video"]
# Independent random streams of one sample; the numbers are part of a run's identity.
PURPOSES = {"order": 0, "first_frame": 1, "noise": 2, "posterior": 3, "caption": 4, "evaluate": 5}


class BatchSamplerError(FlowreelError, ValueError):
    """A dataset that the configured batches cannot be drawn from."""


def random_stream(seed: int, purpose: str, step: int, place: int) -> np.random.Generator:
    """The random numbers of one purpose at one place of one step, independent of all others.

    Counter based (Philox 4x64), so that no stream depends on how many numbers another one drew.

    >>> noise = random_stream(0, "noise", step=3, place=1).standard_normal(4)
    >>> _ = random_stream(0, "caption", step=3, place=1).random(100)
    >>> bool((random_stream(0, "noise", step=3, place=1).standard_normal(4) == noise).all())
    True
    """
    counter = np.array([0, place, step, 0], dtype=np.uint64)
    key = np.array([seed, PURPOSES[purpose]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class StepPlan:
    """One step's global batch.

    Attributes:
        step: number of the step, from 0.
        mode: image or video, alike on all workers.
        bucket: (frames, height, width) of the records read; image steps from clips read a video
            bucket and use frame 0.
        frames: video frames of each record that are used, the first ones.
        ids: the global batch in order; worker r of n takes `share(r, n)`.
        drops_first_frame: whether this step drops the first latent frame (alike on all workers:
            it changes the shape).

    >>> plan = StepPlan(0, "video", Bucket(17, 64, 64), 17, ("a", "b", "c", "d"), False)
    >>> [plan.ids[place] for place in plan.share(rank=1, world=2)]
    ['c', 'd']
    """

    step: int
    mode: Mode
    bucket: Bucket
    frames: int
    ids: tuple[str, ...]
    drops_first_frame: bool

    def share(self, rank: int, world: int) -> range:
        """Global places of one worker's samples; BatchSamplerError where shares are unequal."""
        if len(self.ids) % world:
            raise BatchSamplerError(
                f"a batch of {len(self.ids)} does not divide among {world} workers; choose batch "
                "sizes (or, with a budget of tokens, batches.multiple_of) that are multiples of "
                "the workers"
            )
        size = len(self.ids) // world
        return range(rank * size, (rank + 1) * size)


class _Epoch(NamedTuple):
    """The batches of an epoch, by the places of their samples in the buckets."""

    orders: list[npt.NDArray[np.uint32]]
    """[batches, size] of every bucket."""
    first: npt.NDArray[np.int64]
    """Number of every bucket's first batch among all."""
    batches: npt.NDArray[np.uint32]
    """The order in which they come."""

    def batch(self, index: int) -> tuple[int, list[int]]:
        """The bucket's number, and the places in it, of one batch."""
        batch = int(self.batches[index])
        bucket = int(np.searchsorted(self.first, batch, side="right")) - 1
        return bucket, self.orders[bucket][batch - int(self.first[bucket])].tolist()


TokensOf = Callable[[Bucket], int]
UNEVEN = 2.0
"""Samples seen so many times as often as the others of their kind are worth a word."""


@dataclass(frozen=True)
class BucketViews:
    """How often a run sees the samples of one bucket.

    Attributes:
        mode: what they are used as.
        bucket: theirs.
        count: samples in it.
        batch: samples in one of its batches.
        views: times that each is seen in the run, on average.
    """

    mode: Mode
    bucket: Bucket
    count: int
    batch: int
    views: float


def uneven(views: Sequence[BucketViews]) -> list[str]:
    """What a user should know of a dataset before a long run: a line for each fault.

    Buckets smaller than one of their batches, and samples that are seen over twice as often as
    those of their kind are on average.

    >>> small = BucketViews("video", Bucket(17, 64, 96), count=3, batch=8, views=20.0)
    >>> uneven([BucketViews("video", Bucket(17, 64, 64), 900, 8, 4.0), small])
    ... # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
    ['bucket 17x64x96 holds 3 clips, and a batch of it 8: each stands in every such batch ...',
     'clips of bucket 17x64x96 (3) are seen 20.0 times each, clips in general 4.1 times']
    """
    lines = []
    for one in views:
        noun = "images" if one.mode == "image" else "clips"
        if one.count < one.batch:
            lines.append(
                f"bucket {one.bucket} holds {one.count} {noun}, and a batch of it {one.batch}: "
                f"each stands in every such batch {one.batch / one.count:.1f} times"
            )
        alike = [other for other in views if other.mode == one.mode]
        mean = sum(v.count * v.views for v in alike) / sum(v.count for v in alike)
        if one.views > UNEVEN * mean:
            lines.append(
                f"{noun} of bucket {one.bucket} ({one.count}) are seen {one.views:.1f} times each, "
                f"{noun} in general {mean:.1f} times"
            )
    return lines


def budget_of(config: BatchConfig, mode: Mode) -> int | None:
    """Tokens of a step of this mode; None where it has a number of samples."""
    return config.image_tokens if mode == "image" else config.tokens


def batch_of(config: BatchConfig, mode: Mode, bucket: Bucket, tokens: int) -> int:
    """Samples in a step's batch, over all workers.

    Args:
        bucket: of a record as it is used, for words.
        tokens: that the flow makes of one.

    Raises:
        BatchSamplerError: the budget does not hold `multiple_of` of them.

    >>> batch_of(BatchConfig(tokens=1000, multiple_of=4), "video", Bucket(17, 64, 64), 80)
    12
    """
    budget = budget_of(config, mode)
    if budget is None:
        return config.image_batch_size if mode == "image" else config.batch_size
    size = budget // tokens // config.multiple_of * config.multiple_of
    if size < 1:
        key = "image_tokens" if mode == "image" else "tokens"
        raise BatchSamplerError(
            f"batches.{key} is {budget}, but {config.multiple_of} samples of bucket {bucket} "
            f"have {config.multiple_of * tokens}; give at least so many, or cut the clips "
            "(batches.frames)"
        )
    return size


class BatchSampler:
    """Plans of all steps.

    Every `1/image_ratio`-th step is an image step (evenly spaced, so that the share is exact at
    any time). Within a mode, an epoch cuts every bucket's seeded permutation into whole batches
    and shuffles all of them; the next epoch permutes anew. With a budget of tokens every bucket
    has batches of its own size.

    Args:
        buckets: ids by bucket, as `LatentDataset.buckets` has them; one-frame buckets are images.
        config: sizes of batches, share and source of image steps.
        seed: the run's.
        tokens_of: tokens that the flow makes of a clip of a bucket; needed by a budget of tokens.

    Raises:
        BatchSamplerError: steps of a kind that the dataset has no samples for, or a budget that
            does not hold `multiple_of` samples of some bucket.

    >>> clips = {Bucket(17, 64, 64): ["a", "b", "c", "d"]}
    >>> sampler = BatchSampler(clips, BatchConfig(batch_size=2, image_ratio=0), seed=0)
    >>> [sampler.plan(step).ids for step in (0, 1)]
    [('d', 'a'), ('c', 'b')]
    >>> sampler.plan(1) == BatchSampler(clips, sampler.config, seed=0).plan(1)
    True
    """

    def __init__(
        self,
        buckets: Mapping[Bucket, Sequence[str]],
        config: BatchConfig,
        seed: int,
        tokens_of: TokensOf | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        ordered = {b: buckets[b] for b in sorted(buckets, key=tuple) if len(buckets[b])}
        images = {b: ids for b, ids in ordered.items() if b.frames == 1}
        videos = {b: ids for b, ids in ordered.items() if b.frames > 1}
        from_clips = {"auto": not images, "records": False, "first_frames": True}
        self._buckets: dict[Mode, dict[Bucket, Sequence[str]]] = {
            "image": videos if from_clips[config.image_source] else images,
            "video": videos,
        }
        shares: dict[Mode, float] = {"video": 1 - config.image_ratio, "image": config.image_ratio}
        for mode, share in shares.items():
            if share > 0 and not self._buckets[mode]:
                raise BatchSamplerError(
                    f"{share:.0%} of the steps are {mode} steps, but the dataset has no {mode} "
                    f"samples (buckets: {[tuple(b) for b in ordered]}); change "
                    "train.batches.image_ratio or train.batches.image_source"
                )
        self._sizes = {
            (mode, bucket): self._size(mode, bucket, tokens_of)
            for mode, share in shares.items()
            if share > 0
            for bucket in self._buckets[mode]
        }
        # One cache per object: the plans of an epoch are asked for once per step.
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def _frames(self, mode: Mode, bucket: Bucket) -> int:
        """Video frames of a record of this bucket that a step of this mode uses."""
        return 1 if mode == "image" else min(bucket.frames, self.config.frames or bucket.frames)

    def _size(self, mode: Mode, bucket: Bucket, tokens_of: TokensOf | None) -> int:
        """Samples in a batch of this bucket."""
        cut = bucket._replace(frames=self._frames(mode, bucket))
        if tokens_of is None and budget_of(self.config, mode) is not None:
            raise BatchSamplerError("a budget of tokens needs to know how many a clip has")
        return batch_of(self.config, mode, cut, 0 if tokens_of is None else tokens_of(cut))

    def _mode(self, step: int) -> tuple[Mode, int]:
        """The mode of a step, and how many steps of that mode came before it."""
        images_before = math.floor(step * self.config.image_ratio)
        if math.floor((step + 1) * self.config.image_ratio) > images_before:
            return "image", images_before
        return "video", step - images_before

    def _make_epoch(self, mode: Mode, epoch: int) -> _Epoch:
        orders: list[npt.NDArray[np.uint32]] = []
        for bucket, ids in self._buckets[mode].items():
            size = self._sizes[mode, bucket]
            place = zlib.crc32(repr((mode, tuple(bucket))).encode())
            rng = random_stream(self.seed, "order", epoch, place)
            # A bucket smaller than a batch is gone through several times in one batch.
            order = np.concatenate(
                [rng.permutation(len(ids)) for _ in range(math.ceil(size / len(ids)))]
            )
            orders.append(order[: len(order) // size * size].reshape(-1, size).astype(np.uint32))
        shuffle = random_stream(self.seed, "order", epoch, zlib.crc32(mode.encode()) | 1 << 40)
        batches = shuffle.permutation(sum(map(len, orders))).astype(np.uint32)
        return _Epoch(orders, np.cumsum([0, *map(len, orders)]), batches)

    def batches_per_epoch(self, mode: Mode) -> int:
        """Whole batches in one pass through the data."""
        return sum(self._batches(mode, bucket) for bucket in self._buckets[mode])

    def _batches(self, mode: Mode, bucket: Bucket) -> int:
        """Batches of a bucket in an epoch."""
        return max(1, len(self._buckets[mode][bucket]) // self._sizes[mode, bucket])

    def views(self, steps: int) -> list[BucketViews]:
        """How often a run of so many steps sees the samples of each bucket, on average."""
        images = math.floor(steps * self.config.image_ratio)
        taken: dict[Mode, int] = {"video": steps - images, "image": images}
        out = []
        for (mode, bucket), size in self._sizes.items():
            share = self._batches(mode, bucket) / self.batches_per_epoch(mode)
            count = len(self._buckets[mode][bucket])
            out.append(BucketViews(mode, bucket, count, size, taken[mode] * share * size / count))
        return out

    def plan(self, step: int) -> StepPlan:
        """The global batch of a step."""
        mode, count = self._mode(step)
        epoch, index = divmod(count, self.batches_per_epoch(mode))
        number, places = self._epoch(mode, epoch).batch(index)
        bucket, of_bucket = list(self._buckets[mode].items())[number]
        ids = tuple(of_bucket[i] for i in places)
        draw = random_stream(self.seed, "first_frame", step, 0).random()
        drops_first_frame = mode == "video" and bool(draw < self.config.first_frame_dropout)
        frames = self._frames(mode, bucket)
        return StepPlan(step, mode, bucket, frames, ids, drops_first_frame)
