"""Clips for the benchmarks of preparing: shards of moving shapes, and their rows.

Knows nothing of what is measured.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from data_prep.config import PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.row import Row, is_closing
from data_prep.sources.samples import write_shard
from data_prep.stages import read_rows
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip
from flow.codec_factors import read_factors
from media.write import encode_mp4

UNIQUE_CLIPS = 16
"""So many clips are rendered; the others repeat them."""


def write_clips(
    out: Path, clips: int, per_shard: int, size: tuple[int, int], frames: int, fps: float
) -> list[str]:
    """Shards of H.264 moving shapes of that size at 24 fps.

    A few clips are rendered; the others repeat them under keys of their own.
    """
    length = int((frames + 3) / fps * 24) + 1
    videos = [
        encode_mp4(render_clip(random_scene(seed), length, 24.0, *size), 24.0)
        for seed in range(min(UNIQUE_CLIPS, clips))
    ]
    paths = []
    for shard, first in enumerate(range(0, clips, per_shard)):
        path = out / f"{shard:05d}.tar"
        write_shard(
            path,
            (
                {
                    "__key__": f"{n:07d}",
                    "mp4": videos[n % len(videos)],
                    "txt": "shapes",
                    # The mark of moving shapes: without it they would get no synthetic caption.
                    "json": {"scene": asdict(random_scene(n % len(videos)))},
                }
                for n in range(first, min(first + per_shard, clips))
            ),
        )
        paths.append(str(path))
    return paths


def rows_of_shard(shard: str, config: PrepareConfig) -> list[Row]:
    """The rows of a shard's samples, as the decoding stage takes them."""
    job = ShardJob(Path(shard).stem, shard, fingerprint="", latent_digest="", caption_digest="")
    return [row for row in read_rows(job, config, set()) if not is_closing(row)]


def bucket_sizes(config: PrepareConfig, codec: str) -> list[tuple[int, int]]:
    """(rows, columns) of the buckets, given the codec."""
    return config.bucket.all_sizes(read_factors(codec).space)
