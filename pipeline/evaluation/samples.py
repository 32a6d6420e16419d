"""The videos that a model is measured by, made in batches, and one long video.

A batch shares its passes; each video's noise is that of its own seed, as in `flowreel sample`, so
it is the same video up to what the schedule tolerates. Knows nothing of files.

Shapes: N videos, B batch, T video frames, t latent frames, C channels, h, w latent cells; frames
uint8 [N, T, H, W, 3].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flow.sample_spec import SampleSpec, Schedule
from flow.sampling import batch_noise, sample
from media.frames import Frames
from serving.loading import LoadedModel
from serving.requests import Generation
from serving.session import generate, prompt_text, sample_spec

BATCH = 8
"""Videos that are made at once."""


@dataclass(frozen=True)
class Sampling:
    """How videos are made.

    Attributes:
        guidance: weight w; 0 is none.
        schedule: how the deep block is inverted.
        seed: of the first video; the others count up from it.
    """

    guidance: float
    schedule: Schedule = "jacobi"
    seed: int = 0


@dataclass(frozen=True)
class Texts:
    """Encoded prompts of a batch: text and null text [B, J, E], the latter for guidance."""

    text_BJE: Tensor
    null_BJE: Tensor


def encode(loaded: LoadedModel, prompts: Sequence[str], num_frames: int) -> Texts:
    """The prompts as the flow reads them, for clips of so many video frames."""
    assert loaded.text_encoder is not None
    texts = [prompt_text(prompt, loaded, num_frames) for prompt in (*prompts, "")]
    encoded = loaded.text_encoder.encode(texts).to(loaded.device, loaded.dtype)
    return Texts(encoded[:-1], encoded[-1:].expand(len(prompts), -1, -1))


def spec_of(loaded: LoadedModel, sampling: Sampling, num_frames: int) -> SampleSpec:
    """How the flow samples a video of so many frames, as the service would."""
    return sample_spec(_request("", sampling, sampling.seed, num_frames), loaded)


def noise_shape(loaded: LoadedModel) -> tuple[int, int, int]:
    """(C, h, w) of a latent frame's noise."""
    return (loaded.model.config.latent_channels, *loaded.latent_grid)


def denoiser_of(loaded: LoadedModel) -> str:
    """What takes the noise away: as chosen, or nothing where the model has no denoiser."""
    chosen = loaded.sampling.denoiser
    return "none" if chosen == "learned" and loaded.model.denoiser is None else chosen


def make_videos(
    loaded: LoadedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    seeds: Sequence[int] | None = None,
) -> Frames:
    """A video of the trained length for each prompt: uint8 [N, T, H, W, 3].

    Video number i has the seed `seeds[i]`, by default `sampling.seed + i`.
    """
    assert loaded.codec is not None
    num_frames, made = loaded.facts.num_frames, []
    spec = spec_of(loaded, sampling, num_frames)
    seeds = [sampling.seed + i for i in range(len(prompts))] if seeds is None else seeds
    for low in range(0, len(prompts), BATCH):
        part = prompts[low : low + BATCH]
        texts = encode(loaded, part, num_frames)
        latents = sample(
            loaded.model,
            texts.text_BJE,
            texts.null_BJE,
            spec,
            denoiser=denoiser_of(loaded),
            noise=batch_noise(seeds[low : low + BATCH], noise_shape(loaded)),
        )
        made.append(loaded.codec.decode(latents).cpu().numpy())
        progress(low + len(part), len(prompts))
    return np.concatenate(made)


def make_long_video(
    loaded: LoadedModel,
    prompt: str,
    sampling: Sampling,
    num_frames: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Frames:
    """One video of any length, by sliding the context window: uint8 [T, H, W, 3].

    It is what the service makes, without the service's limit on its length.
    """
    ready = 0

    def count(frames: Frames) -> None:
        nonlocal ready
        ready += len(frames)
        progress(ready, num_frames)

    request = _request(prompt, sampling, sampling.seed, num_frames)
    return generate(loaded, request, on_chunk=lambda chunk: count(chunk.frames)).frames


def _request(prompt: str, sampling: Sampling, seed: int, num_frames: int) -> Generation:
    return Generation(
        request_id="evaluate",
        prompt=prompt,
        num_frames=num_frames,
        guidance=sampling.guidance,
        seed=seed,
        schedule=sampling.schedule,
    )


def exact(spec: SampleSpec) -> SampleSpec:
    """The same sample, solved token by token."""
    return dataclasses.replace(spec, schedule="sequential", tolerance=0.0)
