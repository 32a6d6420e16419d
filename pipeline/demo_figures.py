"""What a trained model has learnt: likelihood against baselines, and whether prompts are followed.

These are its likelihoods against baselines, whether the colour, shape, size and motion that were
asked for are seen, what the codec loses, and how far the service's two replicas worked at the same
time. Runs in one process
on the exported model, the prepared latents and finished videos. Knows nothing of Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import BucketConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.world.draw import random_scene
from data_prep.world.judge import judge
from data_prep.world.prompts import Prompt
from data_prep.world.render import render_clip
from flow.codec import VideoCodec
from flow.flow import LOG_SQRT_2PI
from flow.likelihood import noise_floor
from flow.model_folder import load_model
from flow.text import build_text_encoder
from media.frames import Frames
from pipeline.evaluation.codec_quality import round_trip
from pipeline.evaluation.prompt_following import chances, shares
from pipeline.tables import JUDGED
from training.codec.train import measure as measure_codec
from training.held_out import (
    Captions,
    HeldOutLoss,
    Measurement,
    evaluate_nats,
    gaussian_nats_per_dim,
)

CODEC_CLIPS = 32


def captions_to_show(latents: str | Path, count: int) -> list[str]:
    """Different captions of the data to prompt with, held-out clips first."""
    captions: dict[str, None] = {}
    for split in ("held_out", "train"):
        dataset = LatentDataset(latents, split)
        names = [name for bucket in sorted(dataset.buckets) for name in dataset.buckets[bucket]]
        pairs = [dataset.captions(name) for name in names]
        captions |= dict.fromkeys(synthetic for _original, synthetic in pairs if synthetic)
        captions |= dict.fromkeys(original for original, _synthetic in pairs if original)
    return list(captions)[:count]


def real_clips(asked: Sequence[Prompt], bucket: BucketConfig) -> Frames:
    """A clip that each prompt describes, as the world renders it, uint8 [N, T, H, W, 3]."""
    shape = (bucket.num_frames, bucket.fps, bucket.height, bucket.width)
    return np.stack([render_clip(prompt.scene, *shape) for prompt in asked])


def codec_round_trip(codec_source: str | Path, frames_NTHWC: Frames) -> Frames:
    """The clips as the codec gives them back: what no flow can do better than."""
    return round_trip(VideoCodec.load(codec_source), frames_NTHWC)


def prompt_figures(
    asked: Sequence[Prompt], videos: Sequence[Frames], fps: float, name: str = "accuracy"
) -> dict[str, float]:
    """Shares of videos in which the judge reads what was asked for, beside chance.

    Where it is not sure, it counts as wrong.

    Args:
        asked: a prompt for each video.
        videos: uint8 [T, H, W, 3] each.
        fps: frames per second of the videos.
        name: what the keys end in: `colour_accuracy`, `shape_accuracy`, …
    """
    read = shares(asked, [judge(frames, fps=fps) for frames in videos])
    chance = chances(asked)
    figures = {f"{word}_{name}": read[word].value for word in JUDGED}
    return figures | {f"{word}_chance": chance[word] for word in JUDGED}


def likelihoods(model_dir: Path, latents: str | Path, *, draws: int) -> dict[str, float]:
    """Held-out nats per dimension (no ½ ln 2π), with true and shuffled captions, and of a Gaussian.

    Every estimate is a mean over the same clips and seeded noise draws; `*_stderr` is over the
    draws. An `nll` has ½ ln 2π. The Gaussian is the best one per channel.
    A mean clearly under the noise floor warns (`NoiseFloorWarning`).
    """
    model, spec = load_model(model_dir)
    encoder = build_text_encoder(spec.text)
    train, held_out = LatentDataset(latents, "train"), LatentDataset(latents, "held_out")

    how = Measurement(draws=draws)

    def nats(captions: Captions) -> HeldOutLoss:
        return evaluate_nats(model.flow, held_out, encoder, captions=captions, measurement=how)

    true, shuffled = nats("true"), nats("shuffled")
    gaussian = gaussian_nats_per_dim(train, held_out, spec.flow.noise_std, measurement=how)
    return {
        "held_out_nats_per_dim": true.mean,
        "held_out_stderr": true.standard_error,
        "held_out_nll_bits_per_dim": (true.mean + LOG_SQRT_2PI) / math.log(2),
        "shuffled_caption_nats_per_dim": shuffled.mean,
        "gaussian_nats_per_dim": gaussian.mean,
        "noise_floor_nats_per_dim": noise_floor(spec.flow.noise_std),
        "held_out_clips": len(true.ids),
        "noise_draws": draws,
    }


def overlap_s(spans: list[dict[str, Any]]) -> float:
    """Seconds in which the decoder worked on frame n while the deep block worked on a later frame.

    >>> deep = [{"name": "deep", "frame": n, "start_s": n, "end_s": n + 1} for n in range(3)]
    >>> decode = [{"name": "decode", "frame": 0, "start_s": 1.0, "end_s": 1.5}]
    >>> overlap_s(deep + decode)
    0.5
    """
    total = 0.0
    for decode in (s for s in spans if s["name"] == "decode"):
        for deep in (s for s in spans if s["name"] == "deep" and s["frame"] > decode["frame"]):
            total += max(
                0.0, min(deep["end_s"], decode["end_s"]) - max(deep["start_s"], decode["start_s"])
            )
    return total


def codec_quality(codec_source: str | Path, num_frames: int, fps: float) -> float:
    """PSNR in dB of the codec on moving shapes that nothing was trained on."""
    codec = VideoCodec.load(codec_source)
    return measure_codec(
        codec,
        lambda seed, count: render_clip(random_scene(seed), count, fps),
        CODEC_CLIPS,
        num_frames,
    )["psnr_db"]
