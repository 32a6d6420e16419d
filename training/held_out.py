"""Held-out likelihood, and the simplest model to hold it against.

Nats per dimension of σ-noised latents, without the constant ½ ln 2π, like the training loss. Noise
is seeded per (draw, place), so that two models, or one model with true and with shuffled captions,
are measured on the very same numbers. A mean clearly under the noise floor ½ + ln σ, where no
density can be, warns (`flow.likelihood.NoiseFloorWarning`). Knows nothing of optimizers, Ray or
files other than a latent dataset.

Shapes: D noise draws, N clips; x [B, T, C, h, w] as in `batches.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import HELD_OUT_SHARE, Bucket
from flow.flow import DeepShallowFlow
from flow.likelihood import check_noise_floor, over_draws
from flow.text import TextEncoder
from flowreel.errors import FlowreelError
from training.data.batch_sampler import Mode, random_stream
from training.data.batches import LatentStore, Prompts, noised_latents
from training.objective import RunFlow
from training.parallel import Parallel
from training.sections import EvaluationConfig

Captions = Literal["true", "shuffled", "null"]
CACHE_BYTES = 1 << 30
"""A split up to this many bytes of fp32 is held in memory while it is measured."""


class EvaluationError(FlowreelError, ValueError):
    """Nothing to evaluate on, or captions of an unknown kind."""


@dataclass(frozen=True)
class Measurement:
    """On how many clips a loss is measured, and under which noise.

    Attributes:
        max_clips: clips at most, the first ids of a split.
        draws: noise draws per clip; the same ones for the same seed.
        batch_size: clips in one pass of the flow.
        seed: of the noise.
    """

    max_clips: int = 256
    draws: int = 4
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of every clip under every noise draw.

    Attributes:
        nats_DN: nats per dimension, float64; draws in rows, clips in columns.
        ids: the clips, in the order of the columns.

    >>> loss = HeldOutLoss(np.array([[1.0, 2.0], [3.0, 4.0]]), ("a", "b"))
    >>> loss.mean, loss.standard_error, loss.per_clip
    (2.5, 1.0, (2.0, 3.0))
    """

    nats_DN: np.ndarray
    ids: tuple[str, ...]

    @property
    def draws(self) -> int:
        """Noise draws per clip."""
        return len(self.nats_DN)

    @property
    def per_clip(self) -> tuple[float, ...]:
        """Mean over draws of each clip, nats per dimension."""
        return tuple(float(nats) for nats in self.nats_DN.mean(axis=0))

    @property
    def mean(self) -> float:
        """Over clips and draws, nats per dimension."""
        return float(self.nats_DN.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean over noise draws, clips held fixed; nan with a single draw."""
        means_D = torch.from_numpy(self.nats_DN.mean(axis=1))
        return float(over_draws(means_D).standard_error)


def evaluation_ids(dataset: LatentDataset, max_clips: int) -> tuple[Bucket, list[str]]:
    """The first clips of the video bucket that has most of them; of images where there are none.

    Raises:
        EvaluationError: the split is empty.
    """
    if not dataset.buckets:
        raise EvaluationError(
            f"the {dataset.split} split of {dataset.root} is empty; prepare more clips "
            f"(1 in {HELD_OUT_SHARE} is held out)"
        )
    bucket = max(dataset.buckets, key=lambda b: (b.frames > 1, len(dataset.buckets[b]), tuple(b)))
    return bucket, list(dataset.buckets[bucket][:max_clips])


@dataclass(frozen=True)
class PromptedClips:
    """Clips of one bucket with the prompts they are measured under.

    Attributes:
        store: where their latents come from.
        prompts: what encodes the prompts; it holds the model's structure.
        ids, texts: the clips and their prompts, in one order; a clip's number in it is its place.
        seed: of the noise.
    """

    store: LatentStore
    prompts: Prompts
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    seed: int

    @classmethod
    def of(
        cls,
        store: LatentStore,
        prompts: Prompts,
        *,
        max_clips: int,
        seed: int,
        captions: Captions = "true",
        bucket: Bucket | None = None,
    ) -> PromptedClips:
        """The first clips of a bucket with their own, with shuffled or with empty captions.

        By default the bucket is that of `evaluation_ids`.

        Raises:
            EvaluationError: the split is empty, or `captions` is of an unknown kind.
        """
        if bucket is None:
            bucket, ids = evaluation_ids(store.dataset, max_clips)
        else:
            ids = list(store.dataset.buckets[bucket][:max_clips])
        mode: Mode = "image" if bucket.frames == 1 else "video"
        texts = _captions(store.dataset, ids, captions, seed)
        return cls(
            store, prompts, tuple(ids), tuple(prompts.format(t, bucket, mode) for t in texts), seed
        )

    def nats(
        self, flow: RunFlow, places: Sequence[int], draw: int, device: torch.device
    ) -> np.ndarray:
        """Mean nats per dimension of the clips at `places`, float64; noise from (seed, draw)."""
        config = self.prompts.flow
        x_noisy = noised_latents(
            self.store.load([self.ids[p] for p in places]),
            self.store.dataset.info.convention,
            config.noise_std,
            seed=self.seed,
            step=draw,
            places=places,
            purpose="evaluate",
        )
        if not config.video:
            x_noisy = x_noisy[:, 0]
        text_BJE = self.prompts.encode([self.texts[p] for p in places])
        with torch.no_grad():
            output = flow(x_noisy.to(device), text_BJE.to(device))
            nats = output.nats().double().flatten(1).mean(dim=1)
        return nats.cpu().numpy()

    def numbers_per_clip(self) -> int:
        """Numbers in the latents of one clip."""
        return self.store.load(self.ids[:1]).mean_BTCHW.numel()


def _captions(
    dataset: LatentDataset, ids: Sequence[str], kind: Captions, seed: int
) -> Sequence[str]:
    captions = [synthetic or original for original, synthetic in map(dataset.captions, ids)]
    if kind == "true":
        return captions
    if kind == "null":
        return [""] * len(ids)
    if kind != "shuffled":
        raise EvaluationError(f"captions is {kind!r}; use 'true', 'shuffled' or 'null'")
    return shuffled(captions, seed)


def shuffled(captions: Sequence[str], seed: int) -> list[str]:
    """The captions of other clips: a cycle through a random order, in which none keeps its own."""
    order = random_stream(seed, "order", 0, 1 << 41).permutation(len(captions))
    successor = dict(zip(order, np.roll(order, 1), strict=True))
    return [captions[successor[place]] for place in range(len(captions))]


def evaluate_nats(
    flow: DeepShallowFlow,
    dataset: LatentDataset,
    encoder: TextEncoder,
    *,
    captions: Captions = "true",
    measurement: Measurement | None = None,
    device: torch.device | str = "cpu",
) -> HeldOutLoss:
    """Held-out loss of a flow with true, shuffled or empty captions.

    Args:
        flow: `FlowModel.flow`, unsharded.
        dataset: the split to measure on, such as `LatentDataset(root, "held_out")`.
        encoder: the text encoder that the flow reads.
        captions: "shuffled" gives every clip another clip's caption; "null" the empty one.
        measurement: clips and noise; by default 256 clips at most, 4 draws, seed 0.

    Raises:
        EvaluationError: empty split, or unknown `captions`.

    Warns:
        NoiseFloorWarning: the mean is clearly under ½ + ln σ; the message names likely causes.
    """
    how = measurement or Measurement()
    clips = PromptedClips.of(
        LatentStore(dataset, CACHE_BYTES),
        Prompts(encoder, flow.config, dataset.info.fps),
        max_clips=how.max_clips,
        seed=how.seed,
        captions=captions,
    )
    nats_DN = np.zeros((how.draws, len(clips.ids)))
    for draw in range(how.draws):
        for start in range(0, len(clips.ids), how.batch_size):
            places = range(start, min(start + how.batch_size, len(clips.ids)))
            part = slice(places.start, places.stop)
            nats_DN[draw, part] = clips.nats(flow, places, draw, torch.device(device))
    loss = HeldOutLoss(nats_DN, clips.ids)
    check_noise_floor(
        loss.mean,
        loss.standard_error,
        flow.config.noise_std,
        num_elements=nats_DN.size * clips.numbers_per_clip(),
        what=f"{len(clips.ids)} clips of the {dataset.split} split",
    )
    return loss


def _channel_moments(dataset: LatentDataset, sigma: float, max_clips: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel of σ-noised latents, each [C].

    The noise's share of the variance, σ², is added and not measured.
    """
    _bucket, ids = evaluation_ids(dataset, max_clips)
    store = LatentStore(dataset, cache_bytes=0)
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    convention = dataset.info.convention
    for start in range(0, len(ids), 64):
        records = store.load(ids[start : start + 64])
        places = range(start, start + len(records.ids))
        x = noised_latents(records, convention, 0.0, seed=0, step=0, places=places).double()
        total = total + x.sum(dim=(0, 1, 3, 4))
        squares = squares + x.square().sum(dim=(0, 1, 3, 4))
        count += x.numel() // x.shape[2]
    mean = total / count
    return mean, squares / count - mean.square() + sigma**2


def gaussian_nats_per_dim(
    train: LatentDataset,
    held_out: LatentDataset,
    sigma: float,
    *,
    measurement: Measurement | None = None,
    max_fit_clips: int = 4096,
) -> HeldOutLoss:
    """The loss of the best Gaussian with one mean and one variance per channel.

    It is fitted on `train` and measured on the very latents of `held_out` that `evaluate_nats`
    measures a flow on (same clips, seed and draws), so the difference is what the flow knows beyond
    channel statistics.

    Args:
        sigma: standard deviation of the noise, in latent units.
        measurement: clips and noise, as for `evaluate_nats`.
        max_fit_clips: clips that mean and variance are taken over, at most.
    """
    how = measurement or Measurement()
    mean_C, variance_C = _channel_moments(train, sigma, max_fit_clips)
    _bucket, ids = evaluation_ids(held_out, how.max_clips)
    records = LatentStore(held_out, CACHE_BYTES).load(ids)
    mean_C11, variance_C11 = mean_C[:, None, None], variance_C[:, None, None]
    nats_DN = np.zeros((how.draws, len(ids)))
    for draw in range(how.draws):
        x = noised_latents(
            records,
            held_out.info.convention,
            sigma,
            seed=how.seed,
            step=draw,
            places=range(len(ids)),
            purpose="evaluate",
        ).double()
        element = 0.5 * (x - mean_C11).square() / variance_C11 + 0.5 * variance_C11.log()
        nats_DN[draw] = element.flatten(1).mean(dim=1).numpy()
    return HeldOutLoss(nats_DN, tuple(ids))


class HeldOut:
    """Held-out loss during training, shared out among the workers.

    The bucket of `evaluation_ids` is the headline and has all of the clips; the others, images too,
    share as many again, at least one each.

    Args:
        store: the held-out split.
        prompts: the encoder, and what the model says in a prompt.
        config: how many clips and draws.
        batch_size: clips in one pass, over all workers.
        seed: of the noise.

    Attributes:
        headline: the bucket whose mean is the run's held-out loss.
        clips: those of every bucket, the headline first.
    """

    def __init__(
        self,
        store: LatentStore,
        prompts: Prompts,
        config: EvaluationConfig,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.headline, _ids = evaluation_ids(store.dataset, config.clips)
        others = [bucket for bucket in store.dataset.buckets if bucket != self.headline]
        share = max(1, config.clips // max(1, len(others)))
        counts = {self.headline: config.clips, **dict.fromkeys(others, share)}
        self.clips = {
            bucket: PromptedClips.of(store, prompts, max_clips=count, seed=seed, bucket=bucket)
            for bucket, count in counts.items()
        }
        self.config = config
        self.batch_size = batch_size

    def mean_nats(self, flow: RunFlow, parallel: Parallel) -> float:
        """The headline: mean nats per dimension of its clips; the same number on every worker."""
        return self._mean_nats(self.clips[self.headline], flow, parallel)

    def nats_by_bucket(self, flow: RunFlow, parallel: Parallel) -> dict[Bucket, float]:
        """Mean nats per dimension of every bucket; the same numbers on every worker."""
        return {b: self._mean_nats(clips, flow, parallel) for b, clips in self.clips.items()}

    def _mean_nats(self, clips: PromptedClips, flow: RunFlow, parallel: Parallel) -> float:
        """Mean nats per dimension over clips and draws; every worker gets the same number.

        All workers run the flow equally often, as sharded weights ask of them: short shares are
        padded, and the padding is not counted. The first worker warns where the mean is clearly
        under the noise floor.
        """
        num_clips, draws = len(clips.ids), self.config.draws
        share = -(-num_clips // parallel.world)
        places = [parallel.rank * share + i for i in range(share)]
        counted = np.array([p < num_clips for p in places], dtype=float)
        places = [min(p, num_clips - 1) for p in places]
        size = max(1, self.batch_size // parallel.world)
        total = 0.0
        for draw in range(draws):
            for start in range(0, share, size):
                part = slice(start, start + size)
                nats = clips.nats(flow, places[part], draw, parallel.device)
                total += float((nats * counted[part]).sum())
        values = torch.tensor([total, counted.sum()], dtype=torch.float64, device=parallel.device)
        total, count = parallel.sum(values).tolist()
        mean = total / (count * draws)
        if parallel.is_first:
            check_noise_floor(
                mean,
                math.nan,
                clips.prompts.flow.noise_std,
                num_elements=round(count) * draws * clips.numbers_per_clip(),
                what=f"{round(count)} held-out clips",
            )
        return float(mean)
