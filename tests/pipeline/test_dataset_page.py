"""`flowreel inspect` counts what is there, and its page shows what was kept beside what was not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.latents.inspection import (
    dropped_pictures,
    inspect_dataset,
    kept_pictures,
)
from data_prep.latents.records import LatentDatasetError
from data_prep.sources.samples import write_shard
from data_prep.world.shards import write_world
from flow.codec import VideoCodec
from media.write import encode_mp4
from pipeline.cli import app
from pipeline.recipes import TINY_CODEC
from tests.data_prep.in_process import prepare_locally
from tests.data_prep.test_stages import bad_samples

CLIPS = PrepareConfig(bucket=BucketConfig(num_frames=5, height=32, width=32, fps=8.0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    shards = [str(path) for path in write_world(folder / "in", 6, 3, clips_per_shard=6)]
    write_shard(folder / "in" / "bad.tar", bad_samples())
    prepare_locally(CLIPS, [*shards, str(folder / "in" / "bad.tar")], folder / "out", TINY_CODEC)
    return folder / "out"


def test_figures_are_those_of_the_dataset(dataset: Path) -> None:
    found = inspect_dataset(dataset)
    assert found.counts == {"dropped": 2, "failed": 7, "kept": 13}
    assert sum(found.reasons.values()) == 9
    assert found.reasons["dropped", "low_matching_score"] == 1
    assert [(str(b.bucket), b.clips) for b in found.buckets] == [("1x32x32", 4), ("5x32x32", 9)]
    assert found.buckets[1].seconds == pytest.approx(9 * 5 / 8)
    assert len(found.caption_words["original"]) == 13
    data = LatentDataset(dataset, "all")
    means = [data.get(i).mean.astype(np.float64) for ids in data.buckets.values() for i in ids]
    assert found.channels is not None
    np.testing.assert_allclose(
        found.channels.mean, np.mean([m.mean(axis=(0, 2, 3)) for m in means], axis=0)
    )
    assert found.channels.records == 13
    assert found.size_bytes["latents"] == sum(b.size_bytes for b in found.buckets)


def test_kept_clips_are_decoded_from_their_latents(dataset: Path) -> None:
    pictures = kept_pictures(dataset, VideoCodec.load(TINY_CODEC), 13)
    assert {p.frames.shape for p in pictures if p.frames is not None} == {
        (1, 32, 32, 3),
        (5, 32, 32, 3),
    }
    assert all(
        p.frames is not None and p.frames.std() > 3 for p in pictures if p.key.startswith("0")
    )


def test_latents_of_another_codec_are_not_decoded(dataset: Path) -> None:
    codec = VideoCodec.load(TINY_CODEC)
    codec.digest = "another"
    with pytest.raises(LatentDatasetError, match=r"made by codec \w+, this one is another"):
        kept_pictures(dataset, codec, 2)


def test_what_was_not_kept_is_shown_from_its_source(dataset: Path) -> None:
    pictures = {picture.key: picture for picture in dropped_pictures(dataset, 20)}
    assert len(pictures) == 9
    assert pictures["dull"].frames is not None
    assert pictures["dull"].frames.shape == (1, 32, 64, 3)
    assert pictures["short"].frames is not None
    assert all(pictures[key].frames is None for key in ("gone", "empty", "broken", "noise"))
    assert pictures["jumpy"].reason == "several_shots"
    assert len({p.reason for p in dropped_pictures(dataset, 7)}) == 7


def test_a_shard_that_is_gone_leaves_the_reasons(dataset: Path, tmp_path: Path) -> None:
    write_shard(
        tmp_path / "s.tar",
        [{"__key__": "k", "mp4": encode_mp4(np.zeros((2, 32, 32, 3), np.uint8), 8)}],
    )
    prepare_locally(CLIPS, [str(tmp_path / "s.tar")], tmp_path / "out", TINY_CODEC)
    (tmp_path / "s.tar").unlink()
    (picture,) = dropped_pictures(tmp_path / "out", 5)
    assert (picture.reason, picture.frames) == ("too_short", None)


def test_the_command_prints_tables_and_writes_a_page_that_stands_alone(
    dataset: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(
        app, ["inspect", str(dataset), "--page", str(page), "--pictures", "6"]
    )
    assert done.exit_code == 0, done.output
    for words in ("22 samples of 3 shards", "low_matching_score", "5x32x32", "channels furthest"):
        assert words in done.output
    text = page.read_text()
    assert text.count("data:image/webp;base64,") >= 6
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "several_shots" in text


def test_the_export_command_writes_tars(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "tars"
    done = CliRunner().invoke(app, ["export", str(dataset), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.glob("*.tar")) == ["1x32x32-00000.tar", "5x32x32-00000.tar"]
