"""Shards of the world are a function of their arguments, and their json holds the scene."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from data_prep.world.captions import caption, image_caption
from data_prep.world.draw import random_scene
from data_prep.world.render import render_image
from data_prep.world.scene import EASY, SceneKinds, scene_from
from data_prep.world.shards import is_moving_shapes, write_world


def test_shards_read_back_with_the_webdataset_library(tmp_path: Path) -> None:
    paths = write_world(tmp_path, 5, 3, clips_per_shard=4)
    assert [p.name for p in paths] == ["00000.tar", "00001.tar", "images-00000.tar"]
    samples = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert [set(s) & {"mp4", "png", "txt", "json"} for s in samples] == [
        {"mp4", "txt", "json"}
    ] * 5 + [{"png", "txt", "json"}] * 3
    for sample in samples:
        record = json.loads(sample["json"])
        assert is_moving_shapes(record)
        scene = scene_from(record["scene"])
        write = image_caption if "png" in sample else caption
        assert sample["txt"].decode() == record["caption"] == write(scene)


def test_samples_have_the_size_and_the_kinds_asked_for(tmp_path: Path) -> None:
    (path,) = write_world(tmp_path, 0, 4, kinds=EASY, height=48, width=80, seed=3)
    for sample in wds.WebDataset([str(path)], shardshuffle=False):
        scene = scene_from(json.loads(sample["json"])["scene"])
        assert scene == random_scene(scene.seed, kinds=EASY)
        (tmp_path / "picture.png").write_bytes(sample["png"])
        picture = np.asarray(Image.open(tmp_path / "picture.png"))
        assert np.array_equal(picture, render_image(scene, 48, 80))


def test_an_image_hides_nothing_that_its_caption_names(tmp_path: Path) -> None:
    kinds = SceneKinds(two_things=0, occluders=1)
    clips, images = write_world(tmp_path, 2, 2, kinds=kinds)
    for path, hidden in ((clips, True), (images, False)):
        for sample in wds.WebDataset([str(path)], shardshuffle=False):
            scene = scene_from(json.loads(sample["json"])["scene"])
            assert (scene.occluder is not None) == hidden


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


def test_another_seed_is_another_world(tmp_path: Path) -> None:
    one, other = (write_world(tmp_path / str(seed), 0, 2, seed=seed)[0] for seed in (0, 1))
    assert one.read_bytes() != other.read_bytes()
