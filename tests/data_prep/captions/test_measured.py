"""The measured captioner tells of the synthetic world in its words, and little of the rest."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_prep.captions.measured import MeasuredCaptioner
from data_prep.world.captions import canonical, canonical_image
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip, render_image
from data_prep.world.scene import EASY, Scene, SceneKinds

ONE = SceneKinds(two_things=0, occluders=0)


def told(scene: Scene, *, still: bool = False) -> str:
    """The canonical caption without the texture, which is not read."""
    sentence = canonical_image(scene) if still else canonical(scene)
    return sentence.replace(f" {scene.texture} background", " background")


def softened(frames: np.ndarray, radius: float, noise: float, seed: int) -> np.ndarray:
    """Blurred and noisy, as generated clips are."""
    blur = ImageFilter.GaussianBlur(radius)
    soft = np.stack([np.asarray(Image.fromarray(f).filter(blur)) for f in frames]).astype(float)
    rng = np.random.default_rng(seed)
    return np.clip(soft + rng.normal(0, noise, soft.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("radius", "noise", "bar"), [(0.0, 0.0, 0.95), (1.0, 8.0, 0.95), (2.0, 15.0, 0.9)]
)
def test_scenes_are_told_in_the_words_of_the_grammar(
    radius: float, noise: float, bar: float
) -> None:
    right, total = 0, 30
    for seed in range(total):
        scene = random_scene(2000 + seed, kinds=ONE, split="any")
        frames, fps = ((33, 16.0), (17, 8.0))[seed % 2]
        clip = softened(render_clip(scene, frames, fps), radius, noise, seed)
        right += MeasuredCaptioner(fps).caption(clip) == told(scene)
    assert right >= bar * total


def test_two_things_are_told_of() -> None:
    captioner, right = MeasuredCaptioner(8.0), 0
    for seed in range(10):
        scene = random_scene(3000 + seed, kinds=SceneKinds(two_things=1, occluders=0))
        caption = captioner.caption(render_clip(scene, 17, 8.0))
        names = [f"{thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
        right += all(name in caption for name in names)
    assert right >= 9


def test_pictures_are_told_without_motion() -> None:
    right = 0
    for seed in range(40):
        scene = random_scene(seed, kinds=EASY, split="any")
        caption = MeasuredCaptioner(16.0).caption(render_image(scene)[None])
        right += caption == told(scene, still=True)
    assert right >= 38


@pytest.mark.parametrize("size", [32, 128])
def test_size_does_not_matter(size: int) -> None:
    for seed in range(6):
        scene = random_scene(seed, kinds=EASY, size="large", split="any")
        assert MeasuredCaptioner(8.0).caption(render_clip(scene, 17, 8.0, size, size)) == told(
            scene
        )


def test_scenes_without_a_coloured_thing_get_a_plain_sentence() -> None:
    caption = MeasuredCaptioner(8.0).caption
    grey = np.full((9, 40, 60, 3), 115, dtype=np.uint8)
    assert caption(grey) == "A mostly grey scene without motion."
    assert caption(grey[:1]) == "A mostly grey picture."
    noise = np.random.default_rng(0).integers(0, 255, (9, 40, 60, 3), dtype=np.uint8)
    assert "fast motion" in caption(noise)
    red = np.broadcast_to(np.array([220, 30, 30], dtype=np.uint8), (5, 32, 32, 3))
    assert "red" in caption(red)
