"""A latent dataset, a model and configurations small enough for the tests of training.

The latents are moving blobs whose mean depends on the caption, so that a caption is worth nats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.latents.records import (
    CAPTION_SCHEMA,
    LATENT_SCHEMA,
    Bucket,
    DatasetInfo,
    LatentRecord,
    write_rows,
)
from flow.codec import LatentConvention
from flow.config import FlowConfig
from flow.text import TextSpec
from tests.data_prep.handmade import captions_entry, latents_entry, write_handmade_manifest
from training.config import TrainConfig

CHANNELS = 4
CODEC = "0123456789abcdef"
TEXT = TextSpec(kind="hashed", length=6, dim=16)
WORDS = ("red", "green", "blue", "cyan")


def small_flow(**changes: Any) -> FlowConfig:
    values: dict[str, Any] = {
        "latent_channels": CHANNELS,
        "text_len": 6,
        "text_dim": 16,
        "shallow_width": 32,
        "deep_width": 32,
        "head_dim": 32,
        "layers_per_block": (1, 1, 1, 2),
        "noise_std": 0.3,
        "pos_len": 4.0,
        "denoiser": True,
        "denoiser_layers": 2,
    }
    return FlowConfig(**{**values, **changes})


def small_config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "image_batch_size": 4,
        "flow_learning_rate": 3e-3,
        "denoiser_learning_rate": 3e-3,
        "warmup_steps": 2,
        "checkpoint_every": 3,
        "log_every": 2,
        "ema_decay": 0.9,
        "tracking": False,
    }
    return TrainConfig(**{**values, **changes})


def _latents(rng: np.random.Generator, frames: int, word: int) -> np.ndarray:
    base = np.linspace(-1, 1, len(WORDS))[word]
    x = rng.standard_normal((1, CHANNELS, 4, 4)) * 0.5 + base
    drift = rng.standard_normal((1, CHANNELS, 1, 1)) * 0.2
    return (x + drift * np.arange(frames)[:, None, None, None]).astype(np.float16)


def write_dataset(
    root: Path,
    *,
    clips: int = 48,
    images: int = 24,
    frames: int = 9,
    posterior_noise: bool = False,
    broken: float | None = None,
) -> Path:
    """A dataset folder as `prepare` leaves it; `broken` is a value put into every latent."""
    for folder in ("latents", "captions", "manifests"):
        (root / folder).mkdir(parents=True)
    video, image = Bucket(frames, 64, 64), Bucket(1, 64, 64)
    convention = LatentConvention((0.0,) * CHANNELS, (1.0,) * CHANNELS, 0.6, posterior_noise)
    info = DatasetInfo(CODEC, convention, 8.0, (video, image), CHANNELS, "0" * 16)
    (root / "dataset.json").write_text(json.dumps(info.to_dict()))
    rng = np.random.default_rng(7)
    rows: dict[Bucket, list[dict[str, Any]]] = {video: [], image: []}
    captions = []
    for number in range(clips + images):
        bucket = video if number < clips else image
        word = number % len(WORDS)
        mean = _latents(rng, 1 + (bucket.frames - 1) // 4, word)
        if broken is not None:
            mean[...] = broken
        key = f"clip{number:04d}"
        record = LatentRecord(
            key, 0, number, bucket, 8.0, [0.0], mean, np.full_like(mean, -2.0), CODEC
        )
        rows[bucket].append(record.row())
        captions.append(
            {
                "key": key,
                "window": 0,
                "caption": f"original {WORDS[word]}",
                "synthetic": f"a {WORDS[word]} blob",
                "captioner": "test",
            }
        )
    files = [captions_entry("captions/00000.parquet")]
    write_rows(root / "captions/00000.parquet", captions, CAPTION_SCHEMA)
    for bucket, part in rows.items():
        if part:
            path = f"latents/00000.{bucket}.parquet"
            write_rows(root / path, part, LATENT_SCHEMA)
            files.append(latents_entry(path, str(bucket)))
    write_handmade_manifest(root, "00000", "0" * 16, *files)
    return root
