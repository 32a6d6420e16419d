"""What a run asks of codec and output before it begins."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.records import FORMAT_VERSION, Bucket, LatentDatasetError
from data_prep.run import StageFigures, _sizes, plan_caption_run, plan_run, shards_left
from data_prep.storage.store import open_folder
from flow.aspects import ASPECTS, SizeError
from tests.data_prep.in_process import prepare_locally


def write_buckets(folder: Path, sizes: list[tuple[int, int]]) -> None:
    buckets = sorted(str(Bucket(n, *size)) for n in (1, 9) for size in sizes)
    values = {"version": FORMAT_VERSION, "buckets": buckets}
    (folder / "dataset.json").write_text(json.dumps(values))


@pytest.mark.parametrize("space", [1, 8, 16, 32])
def test_sizes_of_an_output_are_told_without_its_codec_and_in_the_order_of_the_settings(
    tmp_path: Path, space: int
) -> None:
    for area_side in range(256, 1024, 32):
        for aspects in (ASPECTS, ASPECTS[::-1], ("16:9",), ()):
            bucket = BucketConfig(height=area_side, width=area_side, aspects=aspects)
            sizes = bucket.all_sizes(space)
            write_buckets(tmp_path, sizes)
            assert _sizes(bucket, open_folder(tmp_path)) == tuple(sizes)
    exact = BucketConfig(sizes=((64, 32), (32, 64), (32, 32)))
    write_buckets(tmp_path, exact.all_sizes(space))
    assert _sizes(exact, open_folder(tmp_path)) == exact.sizes


def test_sizes_that_the_settings_do_not_give_are_refused(tmp_path: Path) -> None:
    write_buckets(tmp_path, [(48, 80), (64, 64)])
    with pytest.raises(LatentDatasetError, match=r"names sizes \[\(48, 80\), \(64, 64\)\]"):
        _sizes(BucketConfig(aspects=("1:1", "9:16")), open_folder(tmp_path))


def test_clips_that_the_codec_does_not_take_are_refused_before_it_is_loaded(
    world: list[str], tmp_path: Path
) -> None:
    codec, out = tmp_path / "codec", tmp_path / "out"
    codec.mkdir()
    # There are no weights to load.
    factors = {"scale_factor_spatial": 32, "scale_factor_temporal": 6}
    (codec / "config.json").write_text(json.dumps(factors))
    for bucket, words in (
        (BucketConfig(num_frames=17, height=64, width=64), "takes 6k.1 frames: use 13 or 19"),
        (BucketConfig(num_frames=13, height=64, width=48), "multiple of 32: use 32 or 64"),
    ):
        config = PrepareConfig(bucket=bucket)
        with pytest.raises(SizeError, match=words):
            plan_run(config, world, out, str(codec))
        with pytest.raises(SizeError, match=words):
            shards_left(config, world, out, str(codec))
    assert not (out / "dataset.json").exists()


def test_a_run_of_captions_cuts_the_sizes_that_the_latents_have(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    aspects = ("21:9", "1:1", "9:16", "16:9")
    bucket = BucketConfig(num_frames=5, height=32, width=32, aspects=aspects)
    config = config.model_copy(update={"bucket": bucket})
    planned = plan_run(config, world, tmp_path, str(codec_dir)).sizes
    assert planned == ((16, 48), (32, 32), (48, 32), (32, 48))
    prepare_locally(config, world, tmp_path, codec_dir)
    plan = plan_caption_run(config, None, tmp_path)
    assert (plan.sizes, plan.codec) == (planned, "")


def test_the_utilisation_of_a_stage_is_over_all_its_workers() -> None:
    figures = [
        StageFigures("encode", n, busy_s=6.0, elapsed_s=4.0, rows=1, bytes_out=1) for n in (2, 3)
    ]
    assert [f.utilisation for f in figures] == [0.75, 0.5]
    assert all(a.utilisation > b.utilisation for a, b in pairwise(figures))
