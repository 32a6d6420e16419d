"""Which samples a step trains on: a pure function of (seed, configuration, step).

Nothing here has state, so only the step number is checkpointed and a run resumes exactly on any
number of workers. All workers get the same plan and take their slices of it; randomness inside a
sample comes from (seed, step, global place in the batch), so that many workers see what one would.
Knows nothing of tensors, models or files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.latents.records import Bucket
from flowreel.errors import FlowreelError
from training.config import BatchConfig

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
        ids: the global batch in order; worker r of n takes `share(r, n)`.
        drops_first_frame: whether this step drops the first latent frame (alike on all workers:
            it changes the shape).

    >>> plan = StepPlan(0, "video", Bucket(17, 64, 64), ("a", "b", "c", "d"), False)
    >>> [plan.ids[place] for place in plan.share(rank=1, world=2)]
    ['c', 'd']
    """

    step: int
    mode: Mode
    bucket: Bucket
    ids: tuple[str, ...]
    drops_first_frame: bool

    def share(self, rank: int, world: int) -> range:
        """Global places of one worker's samples; BatchSamplerError where shares are unequal."""
        if len(self.ids) % world:
            raise BatchSamplerError(
                f"a batch of {len(self.ids)} does not divide among {world} workers; "
                "choose batch sizes that are multiples of the workers"
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


class BatchSampler:
    """Plans of all steps.

    Every `1/image_ratio`-th step is an image step (evenly spaced, so that the share is exact at
    any time). Within a mode, an epoch cuts every bucket's seeded permutation into whole batches
    and shuffles all of them; the next epoch permutes anew.

    Args:
        buckets: ids by bucket, as `LatentDataset.buckets` has them; one-frame buckets are images.
        config: sizes of batches, share and source of image steps.
        seed: the run's.

    Raises:
        BatchSamplerError: steps of a kind that the dataset has no samples for.

    >>> clips = {Bucket(17, 64, 64): ["a", "b", "c", "d"]}
    >>> sampler = BatchSampler(clips, BatchConfig(batch_size=2, image_ratio=0), seed=0)
    >>> [sampler.plan(step).ids for step in (0, 1)]
    [('d', 'a'), ('c', 'b')]
    >>> sampler.plan(1) == BatchSampler(clips, sampler.config, seed=0).plan(1)
    True
    """

    def __init__(
        self, buckets: Mapping[Bucket, Sequence[str]], config: BatchConfig, seed: int
    ) -> None:
        self.config = config
        self.seed = seed
        self._sizes: dict[Mode, int] = {
            "image": config.image_batch_size,
            "video": config.batch_size,
        }
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
        # One cache per object: the plans of an epoch are asked for once per step.
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def _mode(self, step: int) -> tuple[Mode, int]:
        """The mode of a step, and how many steps of that mode came before it."""
        images_before = math.floor(step * self.config.image_ratio)
        if math.floor((step + 1) * self.config.image_ratio) > images_before:
            return "image", images_before
        return "video", step - images_before

    def _make_epoch(self, mode: Mode, epoch: int) -> _Epoch:
        size = self._sizes[mode]
        orders: list[npt.NDArray[np.uint32]] = []
        for bucket, ids in self._buckets[mode].items():
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
        return sum(max(1, len(ids) // self._sizes[mode]) for ids in self._buckets[mode].values())

    def plan(self, step: int) -> StepPlan:
        """The global batch of a step."""
        mode, count = self._mode(step)
        epoch, index = divmod(count, self.batches_per_epoch(mode))
        number, places = self._epoch(mode, epoch).batch(index)
        bucket, of_bucket = list(self._buckets[mode].items())[number]
        ids = tuple(of_bucket[i] for i in places)
        draw = random_stream(self.seed, "first_frame", step, 0).random()
        drops_first_frame = mode == "video" and bool(draw < self.config.first_frame_dropout)
        return StepPlan(step, mode, bucket, ids, drops_first_frame)
