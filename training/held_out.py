"""Held-out likelihood, and the simplest model to hold it against.

Nats per dimension of σ-noised latents, without the constant ½ ln 2π, like the training loss. Noise
is seeded per (draw, place), so that two models, or one model with true and with shuffled captions,
are scored on the very same numbers. A mean clearly under the noise floor ½ + ln σ, where no density can be, warns
(`flow.likelihood.NoiseFloorWarning`). Knows nothing of training state, Ray or files other than a
latent dataset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import Bucket
from flow.codec import LatentConvention
from flow.config import FlowConfig
from flow.likelihood import check_noise_floor
from flow.text import TextEncoder
from flowreel.errors import FlowreelError
from training.batch_sampler import random_stream
from training.batches import (
    LatentStore,
    Prompts,
    noised_latents,
)
from training.config import TrainConfig
from training.parallel import Parallel

Captions = Literal["true", "shuffled", "null"]


class EvaluationError(FlowreelError, ValueError):
    """Nothing to evaluate on, or captions of an unknown kind."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its spread.

    Attributes:
        mean: nats per dimension.
        standard_error: of the mean over noise draws, clips held fixed; nan with a single draw.
        clips_standard_error: of the mean over clips, noise averaged out.
        per_clip: mean over draws of each clip, in order of `ids`.
        ids: the clips.
        draws: noise draws per clip.
    """

    mean: float
    standard_error: float
    clips_standard_error: float
    per_clip: tuple[float, ...]
    ids: tuple[str, ...]
    draws: int


def _estimate(nats_DN: np.ndarray, ids: Sequence[str]) -> Estimate:
    """From nats of every draw (rows) and clip (columns)."""
    draws, clips = nats_DN.shape
    by_draw, by_clip = nats_DN.mean(axis=1), nats_DN.mean(axis=0)
    over_draws = by_draw.std(ddof=1) / math.sqrt(draws) if draws > 1 else math.nan
    over_clips = by_clip.std(ddof=1) / math.sqrt(clips) if clips > 1 else math.nan
    return Estimate(
        float(nats_DN.mean()),
        float(over_draws),
        float(over_clips),
        tuple(float(v) for v in by_clip),
        tuple(ids),
        draws,
    )


def evaluation_ids(dataset: LatentDataset, max_clips: int) -> tuple[Bucket, list[str]]:
    """Clips of the video bucket that has most of them (of images if there are no clips), first ids
    first.

    Raises:
        EvaluationError: the split is empty.
    """
    if not dataset.buckets:
        raise EvaluationError(
            f"the {dataset.split} split of {dataset.root} is empty; prepare more clips (1 in 16 is held out)"
        )
    bucket = max(dataset.buckets, key=lambda b: (b.frames > 1, len(dataset.buckets[b]), tuple(b)))
    return bucket, list(dataset.buckets[bucket][:max_clips])


def _texts(
    store: LatentStore,
    prompts: Prompts,
    bucket: Bucket,
    ids: Sequence[str],
    kind: Captions,
    seed: int,
) -> list[str]:
    pairs = [store.dataset.captions(i) for i in ids]
    captions = [synthetic or original for original, synthetic in pairs]
    if kind == "null":
        captions = [""] * len(ids)
    elif kind == "shuffled":
        # A cycle through a random order: nobody keeps their own caption.
        order = random_stream(seed, "order", 0, 1 << 41).permutation(len(ids))
        shuffled = dict(zip(order, np.roll(order, 1), strict=True))
        captions = [captions[shuffled[i]] for i in range(len(ids))]
    elif kind != "true":
        raise EvaluationError(f"captions is {kind!r}; use 'true', 'shuffled' or 'null'")
    mode: Literal["image", "video"] = "image" if bucket.frames == 1 else "video"
    return [prompts.format(c, bucket, mode) for c in captions]


def clip_nats(
    flow: nn.Module,
    store: LatentStore,
    prompts: Prompts,
    convention: LatentConvention,
    config: FlowConfig,
    *,
    ids: Sequence[str],
    places: Sequence[int],
    texts: Sequence[str],
    seed: int,
    draw: int,
    device: torch.device,
) -> np.ndarray:
    """Mean nats per dimension of each of `ids`, float64 [N]; noise from (seed, draw, place)."""
    records = store.load(ids)
    x_noisy = noised_latents(
        records, convention, config.noise_std, seed, draw, places, purpose="evaluate"
    )
    if not config.video:
        x_noisy = x_noisy[:, 0]
    with torch.no_grad():
        output = flow(x_noisy.to(device), prompts.encode(texts).to(device))
        nats = output.nats().double().flatten(1).mean(dim=1)
    return nats.cpu().numpy()


def evaluate_nats(
    flow: nn.Module,
    dataset: LatentDataset,
    encoder: TextEncoder,
    config: FlowConfig,
    *,
    captions: Captions = "true",
    draws: int = 4,
    max_clips: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Held-out loss of a flow with true, shuffled or no captions.

    Args:
        flow: `FlowModel.flow`, unsharded.
        dataset: the split to score, such as `LatentDataset(root, "held_out")`.
        captions: "shuffled" gives every clip another clip's caption; "null" the formatted empty
            one.
        draws: noise draws per clip; the same ones for the same seed.

    Raises:
        EvaluationError: empty split, or unknown `captions`.

    Warns:
        NoiseFloorWarning: the mean is clearly under ½ + ln σ; the message names likely causes.
    """
    bucket, ids = evaluation_ids(dataset, max_clips)
    store = LatentStore(dataset, cache_bytes=1 << 30)
    prompts = Prompts(encoder, config, dataset.info.fps)
    texts = _texts(store, prompts, bucket, ids, captions, seed)
    nats = np.zeros((draws, len(ids)))
    for draw in range(draws):
        for start in range(0, len(ids), batch_size):
            part = range(start, min(start + batch_size, len(ids)))
            nats[draw, part.start : part.stop] = clip_nats(
                flow,
                store,
                prompts,
                dataset.info.convention,
                config,
                ids=[ids[i] for i in part],
                places=part,
                texts=[texts[i] for i in part],
                seed=seed,
                draw=draw,
                device=torch.device(device),
            )
    found = _estimate(nats, ids)
    check_noise_floor(
        found.mean,
        found.standard_error,
        config.noise_std,
        num_elements=nats.size * store.load(ids[:1]).mean_BTCHW.numel(),
        what=f"{len(ids)} clips of the {dataset.split} split",
    )
    return found


def _channel_moments(dataset: LatentDataset, sigma: float, max_clips: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel of σ-noised latents [C]; the noise's share of the
    variance is exact.
    """
    _bucket, ids = evaluation_ids(dataset, max_clips)
    store = LatentStore(dataset, cache_bytes=0)
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    convention = dataset.info.convention
    for start in range(0, len(ids), 64):
        records = store.load(ids[start : start + 64])
        places = range(start, start + len(records.ids))
        x = noised_latents(records, convention, 0.0, 0, 0, places).double()
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
    draws: int = 4,
    max_clips: int = 256,
    max_fit_clips: int = 4096,
    seed: int = 0,
) -> Estimate:
    """The best Gaussian with one mean and variance per channel: fitted on `train`, scored on
    `held_out`.

    It is scored on the very latents `evaluate_nats` scores a flow on (same clips, seed and draws),
    so the difference is what the flow knows beyond channel statistics.
    """
    mean, variance = _channel_moments(train, sigma, max_fit_clips)
    _bucket, ids = evaluation_ids(held_out, max_clips)
    store = LatentStore(held_out, cache_bytes=1 << 30)
    records = store.load(ids)
    mean_C11, variance_C11 = mean[:, None, None], variance[:, None, None]
    nats = np.zeros((draws, len(ids)))
    for draw in range(draws):
        x = noised_latents(
            records,
            held_out.info.convention,
            sigma,
            seed,
            draw,
            range(len(ids)),
            purpose="evaluate",
        ).double()
        element = 0.5 * (x - mean_C11).square() / variance_C11 + 0.5 * variance_C11.log()
        nats[draw] = element.flatten(1).mean(dim=1).numpy()
    return _estimate(nats, ids)


class HeldOut:
    """Held-out loss during training, shared out among the workers."""

    def __init__(
        self, dataset: LatentDataset, prompts: Prompts, flow: FlowConfig, config: TrainConfig
    ) -> None:
        self.store = LatentStore(dataset, config.cache_bytes)
        self.prompts, self.flow, self.config = prompts, flow, config
        bucket, self.ids = evaluation_ids(dataset, config.eval_clips)
        self.texts = _texts(self.store, prompts, bucket, self.ids, "true", config.seed)

    @classmethod
    def open(
        cls, root: str | Path, prompts: Prompts, flow: FlowConfig, config: TrainConfig
    ) -> HeldOut:
        """The held-out split of a dataset folder."""
        return cls(LatentDataset(root, split="held_out"), prompts, flow, config)

    def mean_nats(self, flow: nn.Module, parallel: Parallel) -> float:
        """Mean nats per dimension over clips and draws; every worker gets the same number.

        All workers run the flow equally often, as sharded weights ask of them: short shares are
            padded and not counted. The first worker warns where the mean is clearly under the noise floor.
        """
        share = -(-len(self.ids) // parallel.world)
        places = [parallel.rank * share + i for i in range(share)]
        counted = np.array([p < len(self.ids) for p in places], dtype=float)
        places = [min(p, len(self.ids) - 1) for p in places]
        size = max(1, self.config.batch_size // parallel.world)
        total = 0.0
        for draw in range(self.config.eval_draws):
            for start in range(0, share, size):
                part = places[start : start + size]
                nats = clip_nats(
                    flow,
                    self.store,
                    self.prompts,
                    self.store.dataset.info.convention,
                    self.flow,
                    ids=[self.ids[p] for p in part],
                    places=part,
                    texts=[self.texts[p] for p in part],
                    seed=self.config.seed,
                    draw=draw,
                    device=parallel.device,
                )
                total += float((nats * counted[start : start + size]).sum())
        values = torch.tensor([total, counted.sum()], dtype=torch.float64, device=parallel.device)
        total, count = parallel.sum(values).tolist()
        mean = total / (count * self.config.eval_draws)
        if parallel.is_first:
            numbers = self.store.load(self.ids[:1]).mean_BTCHW.numel()
            check_noise_floor(
                mean,
                math.nan,
                self.flow.noise_std,
                num_elements=round(count) * self.config.eval_draws * numbers,
                what=f"{round(count)} held-out clips",
            )
        return float(mean)
