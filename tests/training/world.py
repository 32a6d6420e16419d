"""A latent dataset, a model and configurations small enough for the tests of training.

The latents are moving blobs whose mean depends on the caption, so that a caption is worth nats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from flow.codec_factors import WAN_FACTORS
from flow.config import tiny
from flow.text import TextSpec
from tests.data_prep.handmade import captions_entry, latents_entry, write_handmade_manifest
from training.config import TrainConfig
from training.run import TrainRequest

CHANNELS = 4
CODEC = "0123456789abcdef"
TEXT = TextSpec(kind="hashed", length=6, dim=16)
WORDS = ("red", "green", "blue", "cyan")


SMALL: dict[str, Any] = {
    "steps": 6,
    "batches": {"batch_size": 4, "image_batch_size": 4},
    "optimizer": {
        "flow_learning_rate": 3e-3,
        "denoiser_learning_rate": 3e-3,
        "warmup_steps": 2,
        "ema_decay": 0.9,
    },
    "checkpoints": {"every_steps": 3},
    "tracking": {"enabled": False, "every_steps": 2},
}


def small_config(**changes: Any) -> TrainConfig:
    """A short run; a change is a top-level value, or a map that changes keys of a section.

    >>> small_config(batches={"batch_size": 8}).batches.image_batch_size
    4
    """
    values = dict(SMALL)
    for name, value in changes.items():
        values[name] = {**SMALL.get(name, {}), **value} if isinstance(value, dict) else value
    return TrainConfig(**values)


def two_workers(**changes: Any) -> dict[str, Any]:
    """The section `workers` of two processes that share the work."""
    return {"strategy": "fsdp", "count": 2, **changes}


def small_request(
    dataset: str | Path, out: Path, config: TrainConfig | None = None, **changes: Any
) -> TrainRequest:
    """A run of a small model; changes are other fields of the request."""
    values: dict[str, Any] = {"flow": tiny(), "text": TEXT, **changes}
    return TrainRequest(config or small_config(), dataset=dataset, out=out, **values)


def _latents(rng: np.random.Generator, bucket: Bucket, word: int) -> np.ndarray:
    frames = WAN_FACTORS.latent_frames(bucket.frames)
    cells = WAN_FACTORS.grid(bucket.height, bucket.width)
    base = np.linspace(-1, 1, len(WORDS))[word]
    x = rng.standard_normal((1, CHANNELS, *cells)) * 0.5 + base
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
    more_buckets: Mapping[tuple[int, int], int] | None = None,
) -> Path:
    """A dataset folder as `prepare` leaves it.

    Args:
        broken: a value put into every latent.
        more_buckets: clips of further sizes: how many of each (height, width).
    """
    for folder in ("latents", "captions", "manifests"):
        (root / folder).mkdir(parents=True)
    video, image = Bucket(frames, 64, 64), Bucket(1, 64, 64)
    convention = LatentConvention((0.0,) * CHANNELS, (1.0,) * CHANNELS, 0.6, posterior_noise)
    sizes = {Bucket(frames, *size): count for size, count in (more_buckets or {}).items()}
    buckets = (video, image, *sizes)
    info = DatasetInfo(CODEC, convention, 8.0, buckets, CHANNELS, "0" * 16)
    (root / "dataset.json").write_text(json.dumps(info.to_dict()))
    rng = np.random.default_rng(7)
    rows: dict[Bucket, list[dict[str, Any]]] = {bucket: [] for bucket in buckets}
    captions = []
    counts = {video: clips, image: images, **sizes}
    bucket_of = [bucket for bucket, count in counts.items() for _ in range(count)]
    for number, bucket in enumerate(bucket_of):
        word = number % len(WORDS)
        mean = _latents(rng, bucket, word)
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
