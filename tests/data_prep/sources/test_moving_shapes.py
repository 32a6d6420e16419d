"""The synthetic world is a function of its seeds, and shows what its captions say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data_prep.sources.moving_shapes import (
    COLOURS,
    MOTIONS,
    random_spec,
    render_clip,
    render_image,
    write_world,
)


def test_a_scene_is_a_function_of_its_seed() -> None:
    assert random_spec(5) == random_spec(5)
    assert np.array_equal(render_clip(random_spec(5), 5, 8.0), render_clip(random_spec(5), 5, 8.0))


def test_every_colour_is_drawn_about_as_often() -> None:
    drawn = [random_spec(seed).colour for seed in range(600)]
    assert all(60 < drawn.count(colour) < 145 for colour in COLOURS)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_shape_moves_the_way_its_caption_says(motion: str) -> None:
    spec = random_spec(11, colour="red", motion=motion)
    frames = render_clip(spec, 17, 8.0).astype(int)
    reddish = frames[..., 0] - frames[..., 1:].max(-1) > 80
    centres = [np.argwhere(mask).mean(0) for mask in reddish]
    moved = centres[-1] - centres[0]
    assert np.dot(moved, MOTIONS[motion]) > 5
    assert motion in spec.caption()
    assert spec.colour in spec.image_caption().lower()


def test_an_image_is_the_clip_halfway() -> None:
    spec = random_spec(3)
    assert np.array_equal(render_image(spec), render_clip(spec, 3, 8.0)[1])


def test_shards_read_back_with_the_webdataset_library(tmp_path: Path) -> None:
    paths = write_world(tmp_path, 5, 3, clips_per_shard=4)
    assert [p.name for p in paths] == ["00000.tar", "00001.tar", "images-00000.tar"]
    samples = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert [set(s) & {"mp4", "png", "txt", "json"} for s in samples] == [
        {"mp4", "txt", "json"}
    ] * 5 + [{"png", "txt", "json"}] * 3


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    def digest() -> str:
        return hashlib.sha256(
            b"".join(p.read_bytes() for p in sorted(tmp_path.iterdir()))
        ).hexdigest()

    write_world(tmp_path, 3, 1)
    first = digest()
    (tmp_path / "00000.tar").unlink()
    write_world(tmp_path, 3, 1)
    assert digest() == first
