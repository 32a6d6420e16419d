"""Near-duplicates: the same clip again is masked, other clips are not, in whatever order."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.latents.duplicates import (
    MASK_NAME,
    MAX_BITS,
    near_earlier,
    perceptual_hash,
)
from data_prep.latents.export import export_webdataset
from data_prep.sources.samples import write_shard
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip
from data_prep.world.scene import EASY
from media.write import encode_mp4, encode_png
from tests.data_prep.in_process import digests, prepare_locally


def encoded(frames: np.ndarray, crf: int, scale: float) -> bytes:
    """H.264 of another quality and size."""
    height, width = (int(side * scale) // 2 * 2 for side in frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(width, height)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def bits_between(a: bytes, b: bytes) -> int:
    pair = (np.frombuffer(x, dtype=np.uint8) for x in (a, b))
    return int(np.bitwise_count(next(pair) ^ next(pair)).sum())


def test_the_pass_finds_every_pair_that_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (1500, 32), dtype=np.uint8)
    for row in range(500, 700):
        # Copies with 0 to 20 bits flipped, some of copies.
        flips = rng.choice(256, rng.integers(0, 21), replace=False)
        bits = np.unpackbits(hashes[rng.integers(0, row)])
        bits[flips] ^= 1
        hashes[row] = np.packbits(bits)
    owners = rng.integers(0, 1200, 1500)
    for most in (0, 6, MAX_BITS):
        expected = {}
        for row in range(1, 1500):
            differing = np.bitwise_count(hashes[:row] ^ hashes[row]).sum(axis=1)
            near = np.flatnonzero((differing <= most) & (owners[:row] != owners[row]))
            if len(near):
                expected[row] = int(near[0]), int(differing[near[0]])
        assert near_earlier(hashes, owners, most) == expected
    assert len(expected) > 100


def test_a_thousand_copies_leave_one() -> None:
    hashes = np.repeat(np.random.default_rng(1).integers(0, 256, (1, 32), dtype=np.uint8), 1000, 0)
    nearest = near_earlier(hashes, np.arange(1000), 0)
    assert sorted(nearest) == list(range(1, 1000))
    assert not near_earlier(hashes, np.zeros(1000, dtype=np.int64), 0)


def test_clips_of_one_world_are_told_apart() -> None:
    hashes = [perceptual_hash(render_clip(random_scene(seed), 5, 8.0)) for seed in range(200)]
    array = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32)
    assert not near_earlier(array, np.arange(200), 10)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Twelve clips; in a second shard six of them encoded otherwise, and an image twice."""
    # Each copy's window begins at a moment of its own, so nothing may move far in between.
    scenes = [random_scene(seed, kinds=EASY, speed="slowly") for seed in range(12)]
    clips = [render_clip(scene, 36, 16.0) for scene in scenes]
    ways = [(35, 1.0), (30, 2.0), (30, 0.75), (23, 1.5), (23, 1.0), (28, 1.0)]
    image = encode_png(clips[0][0])
    write_shard(
        tmp_path / "0.tar",
        [{"__key__": f"a{n:02d}", "mp4": encode_mp4(c, 16.0)} for n, c in enumerate(clips)],
    )
    again = [
        {"__key__": f"b{n:02d}", "mp4": encoded(clip, *way), "txt": "again"}
        for n, (clip, way) in enumerate(zip(clips, ways, strict=False))
    ]
    images = [{"__key__": f"c{n}", "png": image} for n in range(2)]
    write_shard(tmp_path / "1.tar", [*again, *images])
    return [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]


def test_the_same_clips_again_are_masked_whatever_the_order(
    shards: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    config = PrepareConfig(bucket=BucketConfig(num_frames=17, height=64, width=64, fps=8.0))
    config = config.model_copy(update={"duplicate_bits": MAX_BITS})
    out = tmp_path / "out"
    prepare_locally(config, shards, out, codec_dir)
    rows = pq.read_table(out / MASK_NAME).to_pylist()
    assert [row["key"] for row in rows] == [*(f"b{n:02d}" for n in range(6)), "c1"]
    assert [row["of_key"] for row in rows] == [*(f"a{n:02d}" for n in range(6)), "c0"]
    dataset = LatentDataset(out, "all")
    assert len(dataset) == 13
    assert len(LatentDataset(out, "all", duplicates="keep")) == 20
    with pytest.raises(ValueError, match="no record '1/b00/0'"):
        dataset.captions("1/b00/0")
    prepare_locally(config, shards[::-1], tmp_path / "other", codec_dir, shuffle=3)
    assert digests(tmp_path / "other")[MASK_NAME] == digests(out)[MASK_NAME]
    assert len(export_webdataset(out, tmp_path / "tars")) == 2
    # Without the setting the mask is gone, and nothing is encoded again.
    report = prepare_locally(
        config.model_copy(update={"duplicate_bits": None}), shards, out, codec_dir
    )
    assert report.samples_now == 0
    assert not (out / MASK_NAME).exists()
    assert len(LatentDataset(out, "all")) == 20
