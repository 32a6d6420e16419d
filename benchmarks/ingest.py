"""How fast batches are made, against how fast a training step takes them.

    python -m benchmarks.ingest [--steps 40] [--store]

Two shapes of records, written for the purpose: clips of the recipe `tiny`, whose step is timed
here, and clips of 81 frames at 480p, whose step is counted: the operations of the 7B on one clip,
at the speed that `--flops` says a GPU has. A batch is latents read, noised, and prompts encoded
(`training.data.batches`), in one thread and without any of it kept from step to step; beside it,
with the dataset kept in memory where it is small enough. `--store` reads the same from an
S3-compatible server on this machine; it needs the development packages. The bar is 10: batches are
made ten times as fast as they are taken.

Knows the batches of training. Knows nothing of Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.training import cases as training_cases
from benchmarks.training import our_step
from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import (
    CAPTION_SCHEMA,
    LATENT_SCHEMA,
    Bucket,
    DatasetInfo,
    LatentRecord,
    write_rows,
)
from data_prep.ledger.manifest import FileEntry, Manifest, write_manifest
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder
from flow.codec_factors import WAN_FACTORS, CodecFactors, read_factors
from flow.config import FlowConfig, video_7b
from flow.flow import FlowModel
from flow.latent_convention import LatentConvention
from flow.text import build_text_encoder
from flow.text_spec import TextSpec
from pipeline.recipes import load_recipe
from training.data.batch_sampler import BatchSampler
from training.data.batches import BatchMaker, LatentStore, Prompts
from training.record.metrics import step_cost
from training.sections import BatchConfig

BAR = 10.0
"""Batches are made so many times as fast as a step takes them."""
CODEC = "0" * 16
GPU_FLOPS = 400e12
"""What a step of the 7B is hoped to reach on an H200 (docs/gpu.md), in bf16."""


@dataclass(frozen=True)
class Case:
    """Records of one bucket, and what a step takes of them.

    Attributes:
        flow, text: the model that reads them, and a text encoder of its sizes.
        bucket: frames, height, width in video frames and pixels.
        factors: of the codec that would have made them.
        clips: records written.
        batch: clips of a step.
        step_s: seconds of a step.
    """

    name: str
    flow: FlowConfig
    text: TextSpec
    bucket: Bucket
    factors: CodecFactors
    clips: int
    batch: int
    step_s: float


def tiny_case(rounds: int) -> Case:
    """The recipe `tiny`, its step timed."""
    recipe = load_recipe("tiny")
    bucket = recipe.prepare.bucket
    take = our_step(training_cases()[0], "fp32")
    take()
    took = []
    for _ in range(rounds):
        begun = time.perf_counter()
        take()
        took.append(time.perf_counter() - begun)
    return Case(
        "tiny",
        recipe.model,
        recipe.text,
        Bucket(bucket.num_frames, bucket.height, bucket.width),
        read_factors(recipe.codec_source),
        256,
        recipe.train.batches.batch_size,
        statistics.median(took),
    )


def large_case(flops: float) -> Case:
    """A clip of the 7B at 480p, one for each GPU, its step counted."""
    flow, bucket = video_7b(), Bucket(81, 480, 848)
    with torch.device("meta"):
        model = FlowModel(flow)
    rows, columns = WAN_FACTORS.grid(bucket.height, bucket.width)
    cost = step_cost(
        model,
        flow,
        batch=1,
        frames=WAN_FACTORS.latent_frames(bucket.frames),
        height=rows,
        width=columns,
        with_denoiser=True,
    )
    text = TextSpec(kind="hashed", length=flow.text_len, dim=flow.text_dim)
    seconds = (cost.matmul_flops + cost.attention_flops) / flops
    return Case("7B, 480p", flow, text, bucket, WAN_FACTORS, 24, 1, seconds)


def write_clips(root: Location, case: Case) -> None:
    """A dataset of random moments, as `prepare` would have left it, in one shard."""
    folder = open_folder(root)
    channels = case.flow.latent_channels
    convention = LatentConvention((0.0,) * channels, (1.0,) * channels)
    info = DatasetInfo(CODEC, convention, 16.0, (case.bucket,), channels, "0" * 16)
    rng = np.random.default_rng(0)
    grid = case.factors.grid(case.bucket.height, case.bucket.width)
    shape = (case.factors.latent_frames(case.bucket.frames), channels, *grid)
    keys = [f"clip{n:05d}" for n in range(case.clips)]
    records = []
    for n, key in enumerate(keys):
        mean = rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
        records.append(LatentRecord(key, 0, n, case.bucket, 16.0, [0.0], mean, None, CODEC).row())
    captions = [
        {
            "key": key,
            "window": 0,
            "caption": f"clip {key}",
            "synthetic": f"a longer caption of the clip that is called {key}",
            "captioner": "none",
        }
        for key in keys
    ]
    paths = {
        "latents": f"latents/00000.{case.bucket}.parquet",
        "captions": "captions/00000.parquet",
    }
    with tempfile.TemporaryDirectory() as here:
        for kind, rows, schema in (
            ("latents", records, LATENT_SCHEMA),
            ("captions", captions, CAPTION_SCHEMA),
        ):
            local = Path(here) / f"{kind}.parquet"
            write_rows(local, rows, schema)
            folder.write(paths[kind], local.read_bytes())
    entries = (
        FileEntry("status", "status/00000.parquet", case.clips, ""),
        FileEntry("latents", paths["latents"], case.clips, "", bucket=str(case.bucket)),
        FileEntry("captions", paths["captions"], case.clips, "", failures={}),
    )
    manifest = Manifest(
        shard="00000", source="00000.tar", fingerprint="", job="", latent_digest="0" * 16,
        caption_digest="", num_samples=case.clips, truncated=False, ignored_members=0, error="",
        sha256="", counts={}, reasons={}, files=entries,
    )  # fmt: skip
    folder.write("dataset.json", json.dumps(info.to_dict()).encode())
    write_manifest(folder, manifest)


def seconds_of_a_batch(root: Location, case: Case, steps: int, cache_bytes: int) -> float:
    """Median seconds in which one thread makes a batch."""
    dataset = LatentDataset(root, "all", cached_groups=1)
    config = BatchConfig(batch_size=case.batch, image_ratio=0.0)
    prompts = Prompts(build_text_encoder(case.text), case.flow, dataset.info.fps)
    maker = BatchMaker(LatentStore(dataset, cache_bytes), prompts, config, 0, case.factors)
    sampler = BatchSampler(dataset.buckets, config, 0)
    maker.make(sampler.plan(0), 0, 1)
    took = []
    for step in range(1, steps + 1):
        plan = sampler.plan(step)
        begun = time.perf_counter()
        maker.make(plan, 0, 1)
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


@contextmanager
def places(with_store: bool) -> Iterator[dict[str, Location]]:
    """Where datasets are written: a folder, and a bucket where it is asked for."""
    with ExitStack() as stack:
        here = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flowreel-ingest-")))
        found: dict[str, Location] = {"folder": here / "latents"}
        if with_store:
            from tests.data_prep.s3_server import CREDENTIALS, running_store

            os.environ.update({**CREDENTIALS, "XDG_CACHE_HOME": str(here / "cache")})
            found["store"] = stack.enter_context(running_store(here)).uri("latents")
        yield found


def report(case: Case, roots: dict[str, Location], steps: int) -> bool:
    """Print a row for each place; whether all of them hold the bar."""
    grid = case.factors.grid(case.bucket.height, case.bucket.width)
    frames = case.factors.latent_frames(case.bucket.frames)
    # Two bytes a number in the file.
    size = 2 * case.batch * frames * case.flow.latent_channels * grid[0] * grid[1]
    print(
        f"{case.name}: a step of {case.batch} clips takes {case.step_s:.3f} s; "
        f"their latents are {size / 1e6:.2f} MB"
    )
    holds = True
    for name, root in roots.items():
        write_clips(root, case)
        kept = {f"{name}": 0} | ({f"{name}, kept in memory": 2 << 30} if name == "folder" else {})
        for words, cache_bytes in kept.items():
            took = seconds_of_a_batch(root, case, steps, cache_bytes)
            ratio = case.step_s / took
            holds &= ratio >= BAR
            print(
                f"  {words:24} {1e3 * took:8.1f} ms a batch {size / took / 1e6:8.1f} MB/s "
                f"{ratio:8.1f} times as fast as it is taken"
            )
    return holds


def main(arguments: list[str] | None = None) -> int:
    """Print the rows and whether they hold the bar."""
    parser = argparse.ArgumentParser(prog="benchmarks.ingest", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=40, help="batches made of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed")
    parser.add_argument("--flops", type=float, default=GPU_FLOPS, help="of a GPU at the 7B's step")
    parser.add_argument("--store", action="store_true", help="from an S3-compatible server too")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    holds = True
    for case in (tiny_case(given.rounds), large_case(given.flops)):
        with places(given.store) as roots:
            holds &= report(case, roots, given.steps)
    print(f"ten times as fast as they are taken: {'holds' if holds else 'DOES NOT HOLD'}")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
