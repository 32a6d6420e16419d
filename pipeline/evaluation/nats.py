"""Held-out nats per dimension, bucket by bucket, beside floor, best Gaussian and shuffled captions.

The clips are those of a prepared dataset, or any that were encoded a moment ago. They take on the
noise that `training.held_out` gives them, so that both measure the same numbers. Knows nothing of
Ray or files.

Shapes: D noise draws, N clips; latents [N, T, C, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.latents.dataset import LatentBatch, LatentDataset
from data_prep.latents.records import Bucket
from flow.flow import LOG_SQRT_2PI, DeepShallowFlow
from flow.latent_convention import LatentConvention
from flow.likelihood import check_noise_floor, noise_floor
from training.data.batches import Prompts, noised_latents
from training.held_out import HeldOutLoss, shuffled

BATCH = 32
"""Clips in one pass of the flow."""
FIT_CLIPS = 1024
"""Clips at most that a Gaussian is fitted to."""


@dataclass(frozen=True)
class SizedClips:
    """Clips of one size and their captions.

    Attributes:
        bucket: their frames, height and width.
        captions: one for each clip.
        load: the codec's moments of the clips at some places.
    """

    bucket: Bucket
    captions: tuple[str, ...]
    load: Callable[[Sequence[int]], LatentBatch]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.captions)

    @classmethod
    def of_latents(
        cls, bucket: Bucket, mean_NTCHW: Tensor, logvar_NTCHW: Tensor, captions: Sequence[str]
    ) -> SizedClips:
        """Clips that were encoded a moment ago: moments fp32 [N, T, C, h, w]."""

        def load(places: Sequence[int]) -> LatentBatch:
            at = list(places)
            texts = [captions[place] for place in at]
            return LatentBatch(mean_NTCHW[at], logvar_NTCHW[at], texts, texts, list(map(str, at)))

        return cls(bucket, tuple(captions), load)

    @classmethod
    def of_dataset(cls, dataset: LatentDataset, bucket: Bucket, max_clips: int) -> SizedClips:
        """The first clips of one bucket of a dataset, synthetic captions before original ones."""
        ids = list(dataset.buckets[bucket][:max_clips])
        captions = [synthetic or original for original, synthetic in map(dataset.captions, ids)]
        return cls(bucket, tuple(captions), lambda at: dataset.load([ids[place] for place in at]))


@dataclass(frozen=True)
class BucketNats:
    """The loss of the clips of one size, nats per dimension without ½ ln 2π."""

    held_out_nats_per_dim: float
    held_out_stderr: float
    """Of the mean over noise draws, clips held fixed."""
    shuffled_caption_nats_per_dim: float
    gaussian_nats_per_dim: float
    """Of the best Gaussian with one mean and one variance per channel."""
    clips: int


@dataclass(frozen=True)
class Nats:
    """The loss of the largest bucket of videos, and of each bucket; nats per dimension.

    `held_out_nll_bits_per_dim` has ½ ln 2π, all other figures are without it.
    """

    held_out_nats_per_dim: float
    held_out_stderr: float
    held_out_nll_bits_per_dim: float
    shuffled_caption_nats_per_dim: float
    gaussian_nats_per_dim: float
    noise_floor_nats_per_dim: float
    held_out_clips: int
    noise_draws: int
    buckets: dict[str, BucketNats]


@dataclass(frozen=True)
class Measured:
    """With what a loss is measured: the flow, its prompts and convention, the noise."""

    flow: DeepShallowFlow
    prompts: Prompts
    convention: LatentConvention
    draws: int
    seed: int

    def noised(self, clips: SizedClips, places: Sequence[int], draw: int) -> Tensor:
        """Latents [n, T, C, h, w] of the clips at some places with the noise of one draw."""
        return noised_latents(
            clips.load(places),
            self.convention,
            self.flow.config.noise_std,
            seed=self.seed,
            step=draw,
            places=places,
            purpose="evaluate",
        )


def measure_nats(
    how: Measured,
    held_out: Sequence[SizedClips],
    fit: Sequence[SizedClips],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Nats:
    """Every figure of `Nats`.

    Args:
        how: flow, prompts and noise.
        held_out: what is measured, a size each.
        fit: what the Gaussians are fitted to; a size that is not among them takes all of it.
        progress: called with (passes done, passes in all).

    Warns:
        NoiseFloorWarning: a mean is clearly under ½ + ln σ.
    """
    total, done = 2 * how.draws * sum(-(-len(clips) // BATCH) for clips in held_out), 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    buckets: dict[Bucket, BucketNats] = {}
    for clips in held_out:
        true = flow_loss(how, clips, clips.captions, count)
        _check_floor(how, clips, true)
        others = flow_loss(how, clips, shuffled(clips.captions, how.seed), count)
        same_size = [other for other in fit if other.bucket == clips.bucket]
        gaussian = gaussian_loss(how, clips, same_size or fit)
        buckets[clips.bucket] = BucketNats(
            true.mean, true.standard_error, others.mean, gaussian.mean, len(clips)
        )
    main = max(buckets, key=lambda b: (b.frames > 1, buckets[b].clips, tuple(b)))
    of_main = buckets[main]
    return Nats(
        held_out_nats_per_dim=of_main.held_out_nats_per_dim,
        held_out_stderr=of_main.held_out_stderr,
        held_out_nll_bits_per_dim=(of_main.held_out_nats_per_dim + LOG_SQRT_2PI) / math.log(2),
        shuffled_caption_nats_per_dim=of_main.shuffled_caption_nats_per_dim,
        gaussian_nats_per_dim=of_main.gaussian_nats_per_dim,
        noise_floor_nats_per_dim=noise_floor(how.flow.config.noise_std),
        held_out_clips=of_main.clips,
        noise_draws=how.draws,
        buckets={str(bucket): figures for bucket, figures in buckets.items()},
    )


def _parts(clips: SizedClips) -> list[range]:
    return [range(low, min(low + BATCH, len(clips))) for low in range(0, len(clips), BATCH)]


@torch.no_grad()
def flow_loss(
    how: Measured,
    clips: SizedClips,
    captions: Sequence[str],
    each: Callable[[], None] = lambda: None,
) -> HeldOutLoss:
    """The loss of the flow on clips that it is told these captions of; `each` after every pass."""
    mode = "image" if clips.bucket.frames == 1 else "video"
    texts = [how.prompts.format(caption, clips.bucket, mode) for caption in captions]  # type: ignore[arg-type]
    nats_DN = np.zeros((how.draws, len(clips)))
    for draw in range(how.draws):
        for places in _parts(clips):
            x_noisy = how.noised(clips, places, draw)
            x_noisy = x_noisy if how.flow.config.video else x_noisy[:, 0]
            device = next(how.flow.parameters()).device
            text_BJE = how.prompts.encode([texts[place] for place in places]).to(device)
            nats = how.flow(x_noisy.to(device), text_BJE).nats().double().flatten(1).mean(dim=1)
            nats_DN[draw, places.start : places.stop] = nats.cpu().numpy()
            each()
    return HeldOutLoss(nats_DN, tuple(map(str, range(len(clips)))))


def gaussian_loss(how: Measured, clips: SizedClips, fit: Sequence[SizedClips]) -> HeldOutLoss:
    """The loss of the best Gaussian, one mean and variance per channel, on the same numbers."""
    mean_C, variance_C = _moments(how, fit)
    mean_C11, variance_C11 = mean_C[:, None, None], variance_C[:, None, None]
    nats_DN = np.zeros((how.draws, len(clips)))
    for draw in range(how.draws):
        for places in _parts(clips):
            x = how.noised(clips, places, draw).double()
            element = 0.5 * (x - mean_C11).square() / variance_C11 + 0.5 * variance_C11.log()
            nats_DN[draw, places.start : places.stop] = element.flatten(1).mean(dim=1).numpy()
    return HeldOutLoss(nats_DN, tuple(map(str, range(len(clips)))))


def _moments(how: Measured, fit: Sequence[SizedClips]) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel of σ-noised latents, each [C], float64.

    The noise's share of the variance, σ², is added and not measured.
    """
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for clips in fit:
        for places in _parts(clips):
            records = clips.load(places)
            x = noised_latents(records, how.convention, 0.0, seed=0, step=0, places=places).double()
            total = total + x.sum(dim=(0, 1, 3, 4))
            squares = squares + x.square().sum(dim=(0, 1, 3, 4))
            count += x.numel() // x.shape[2]
    mean = total / count
    return mean, squares / count - mean.square() + how.flow.config.noise_std**2


def _check_floor(how: Measured, clips: SizedClips, loss: HeldOutLoss) -> None:
    check_noise_floor(
        loss.mean,
        loss.standard_error,
        how.flow.config.noise_std,
        num_elements=loss.nats_DN.size * clips.load([0]).mean_BTCHW.numel(),
        what=f"{len(clips)} held-out clips of {clips.bucket}",
    )
