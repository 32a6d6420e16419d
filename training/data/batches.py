"""From a step's plan to the tensors of one worker: latents, noise and encoded prompts.

All randomness of a sample comes from (seed, step, its place in the global batch), so that it does
not matter which worker makes it. Knows nothing of models' insides, optimizers or processes.

Shapes: B batch, T latent frames, C channels, h, w latent rows and columns, J text tokens, E text
width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from data_prep.latents.dataset import LatentBatch, LatentDataset
from data_prep.latents.records import Bucket
from flow.codec import LatentConvention
from flow.codec_factors import WAN_FACTORS, CodecFactors
from flow.config import FlowConfig
from flow.prompt import EXTEND_PREFIX, prompt_for
from flow.text import TextEncoder, without_padding
from training.data.batch_sampler import BatchSampler, Mode, StepPlan, random_stream
from training.sections import BatchConfig

PROMPT_CACHE_BYTES = 1 << 30
"""Bytes of encoded prompts that a worker keeps in memory."""


class Prompts:
    """Captions in, encoded prompts out; those met last are kept, without their padding.

    Several threads may call it: the one that makes the next batch, and the one that evaluates.

    Args:
        encoder: the text encoder that the model reads.
        flow: the model's structure; it says what a prompt mentions.
        fps: frames per second of the dataset's clips.
        cache_bytes: of vectors that are kept; the prompts longest not asked for make room.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        flow: FlowConfig,
        fps: float,
        cache_bytes: int = PROMPT_CACHE_BYTES,
    ) -> None:
        self.encoder = encoder
        self.flow = flow
        self.fps = fps
        self.cache_bytes = cache_bytes
        self.held_bytes = 0
        self._encoded: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def format(self, caption: str, bucket: Bucket, mode: Mode, *, extend: bool = False) -> str:
        """The prompt of a clip of this bucket, or of one frame of it where the mode is image."""
        return prompt_for(
            caption,
            self.flow,
            num_frames=1 if mode == "image" else bucket.frames,
            height=bucket.height,
            width=bucket.width,
            fps=self.fps,
            prefix=EXTEND_PREFIX if extend else "",
        )

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """What the encoder makes of each prompt, fp32 [B, J, E]."""
        with self._lock:
            missing = sorted({p for p in prompts if p not in self._encoded})
            if missing:
                for prompt, row_JE in zip(missing, self.encoder.encode(missing), strict=True):
                    self._encoded[prompt] = without_padding(row_JE)
                    self.held_bytes += self._encoded[prompt].nbytes
            spec = self.encoder.spec
            out_BJE = torch.zeros(len(prompts), spec.length, spec.dim)
            for place, prompt in enumerate(prompts):
                tokens_NE = self._encoded[prompt]
                out_BJE[place, : len(tokens_NE)] = tokens_NE
                self._encoded.move_to_end(prompt)
            # Only now, so that a batch larger than the cache is whole when it is handed out.
            while self.held_bytes > self.cache_bytes:
                self.held_bytes -= self._encoded.popitem(last=False)[1].nbytes
            return out_BJE


class LatentStore:
    """A latent dataset, held whole in memory where it is small enough.

    Args:
        dataset: what is read.
        cache_bytes: size up to which the dataset is held, as fp32; 0 holds nothing.
    """

    def __init__(self, dataset: LatentDataset, cache_bytes: int) -> None:
        self.dataset = dataset
        self._cached: dict[str, tuple[Tensor, Tensor, str, str]] = {}
        self._cache_bytes = cache_bytes
        self._measured = False

    def _fill(self, first: LatentBatch) -> None:
        self._measured = True
        count = sum(len(ids) for ids in self.dataset.buckets.values())
        largest = 2 * 4 * first.mean_BTCHW[0].numel()
        if count * largest > self._cache_bytes:
            return
        for ids in self.dataset.buckets.values():
            for start in range(0, len(ids), 256):
                part = ids[start : start + 256]
                batch = self.dataset.load(part)
                for i, sample in enumerate(part):
                    self._cached[sample] = (
                        batch.mean_BTCHW[i].clone(),
                        batch.logvar_BTCHW[i].clone(),
                        batch.captions[i],
                        batch.synthetic[i],
                    )

    def load(self, ids: Sequence[str]) -> LatentBatch:
        """The records of one bucket, in the order asked for."""
        if not self._measured:
            self._fill(self.dataset.load(list(ids)))
        if not self._cached:
            return self.dataset.load(list(ids))
        rows = [self._cached[i] for i in ids]
        return LatentBatch(
            torch.stack([r[0] for r in rows]),
            torch.stack([r[1] for r in rows]),
            [r[2] for r in rows],
            [r[3] for r in rows],
            list(ids),
        )


@dataclass(frozen=True)
class TrainBatch:
    """One worker's share of a step.

    Attributes:
        x_noisy: x + σ·ε, fp32 [B, T, C, h, w] ([B, C, h, w] for image models).
        text_BJE: encoded prompts, fp32 [B, J, E].
        prompts: what they say.
        mode: image or video.
    """

    x_noisy: Tensor
    text_BJE: Tensor
    prompts: list[str]
    mode: Mode

    def parts(self, count: int) -> list[TrainBatch]:
        """The batch in so many equal micro-batches, in order."""
        size, rest = divmod(len(self.prompts), count)
        assert rest == 0, "the configuration makes batches that divide"
        return [
            TrainBatch(
                self.x_noisy[start : start + size],
                self.text_BJE[start : start + size],
                self.prompts[start : start + size],
                self.mode,
            )
            for start in range(0, len(self.prompts), size)
        ]

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on a device."""
        return TrainBatch(
            self.x_noisy.to(device, non_blocking=True),
            self.text_BJE.to(device, non_blocking=True),
            self.prompts,
            self.mode,
        )


def _normal(rng: np.random.Generator, shape: torch.Size) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def noised_latents(
    batch: LatentBatch,
    convention: LatentConvention,
    sigma: float,
    *,
    seed: int,
    step: int,
    places: Sequence[int],
    purpose: str = "noise",
) -> Tensor:
    """x + σ·ε [B, T, C, h, w]; noise of a sample depends on (seed, step, place) alone.

    Posterior noise (where the convention samples it) has a stream of its own. Training and
    evaluation both call this, so that both see data made one way.

    Args:
        sigma: standard deviation of the noise, in latent units.
        seed, step, purpose: name the stream of random numbers (`random_stream`).
        places: place of each sample in the global batch.
    """
    shape = batch.mean_BTCHW.shape[1:]
    posterior = None
    if convention.posterior_noise:
        posterior = torch.stack(
            [_normal(random_stream(seed, "posterior", step, p), shape) for p in places]
        )
    x_BTCHW = convention.to_model(batch.mean_BTCHW, batch.logvar_BTCHW, posterior)
    noise = torch.stack([_normal(random_stream(seed, purpose, step, p), shape) for p in places])
    return x_BTCHW + sigma * noise


class BatchMaker:
    """Makes one worker's share of any step.

    Args:
        store: the latents; their dataset says which convention makes the model's latents of them.
        prompts: the encoder, and what the model says in a prompt.
        config: how captions are mixed.
        seed: the run's.
        factors: the codec's: how many latent frames the first frames of a clip are.
    """

    def __init__(
        self,
        store: LatentStore,
        prompts: Prompts,
        config: BatchConfig,
        seed: int,
        factors: CodecFactors = WAN_FACTORS,
    ) -> None:
        self.store = store
        self.factors = factors
        self.prompts = prompts
        self.config = config
        self.seed = seed

    def _caption(self, plan: StepPlan, place: int, original: str, synthetic: str) -> str:
        """One caption: empty, original or synthetic (0.1 : 0.09 : 0.81 by default)."""
        dropout_draw, original_draw = random_stream(self.seed, "caption", plan.step, place).random(
            2
        )
        if dropout_draw < self.config.caption_dropout:
            return ""
        use_original = original_draw < self.config.original_caption_ratio
        return (original if use_original else synthetic) or original or synthetic

    def make(self, plan: StepPlan, rank: int, world: int) -> TrainBatch:
        """The samples `plan.share(rank, world)`, noised and with their prompts encoded."""
        places = plan.share(rank, world)
        records = self.store.load([plan.ids[p] for p in places])
        if plan.frames < plan.bucket.frames:
            # A causal codec has not seen what comes later: the first latents of a clip are those
            # of its first frames.
            kept = self.factors.latent_frames(plan.frames)
            records = replace(
                records,
                mean_BTCHW=records.mean_BTCHW[:, :kept],
                logvar_BTCHW=records.logvar_BTCHW[:, :kept],
            )
        flow = self.prompts.flow
        x_noisy = noised_latents(
            records,
            self.store.dataset.info.convention,
            flow.noise_std,
            seed=self.seed,
            step=plan.step,
            places=places,
        )
        drops_first_frame = plan.drops_first_frame and x_noisy.shape[1] > 1
        if drops_first_frame:
            x_noisy = x_noisy[:, 1:].contiguous()
        bucket = plan.bucket._replace(frames=plan.frames)
        captions = [
            self._caption(plan, p, original, synthetic)
            for p, original, synthetic in zip(
                places, records.captions, records.synthetic, strict=True
            )
        ]
        texts = [
            self.prompts.format(caption, bucket, plan.mode, extend=drops_first_frame)
            for caption in captions
        ]
        if not flow.video:
            x_noisy = x_noisy[:, 0]
        return TrainBatch(x_noisy, self.prompts.encode(texts), texts, plan.mode)

    def batches(
        self, sampler: BatchSampler, start: int, stop: int, rank: int, world: int
    ) -> Iterator[tuple[StepPlan, TrainBatch]]:
        """Plans and shares of the steps start..stop-1; with `prefetch` the next is made ahead."""
        if not self.config.prefetch:
            for step in range(start, stop):
                plan = sampler.plan(step)
                yield plan, self.make(plan, rank, world)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            # One batch ahead and no more: a second would wait in memory for nothing.
            plans = [sampler.plan(start)] if start < stop else []
            ahead = [pool.submit(self.make, plan, rank, world) for plan in plans]
            for step in range(start, stop):
                plan, batch = plans.pop(), ahead.pop()
                if step + 1 < stop:
                    plans.append(sampler.plan(step + 1))
                    ahead.append(pool.submit(self.make, plans[0], rank, world))
                yield plan, batch.result()
