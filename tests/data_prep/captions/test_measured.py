"""The measured captioner reads the synthetic world, sharp or soft, and says little of the rest."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_prep.captions.measured import (
    MeasuredCaptioner,
    measure,
    rotational_moments,
)
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip, render_image
from data_prep.world.scene import EASY, Scene

SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down")


def scene_of(seed: int, **fixed: str) -> Scene:
    """A scene of those that the captioner reads."""
    words = {"shape": SHAPES[seed % 3], "motion": MOTIONS[seed // 3 % 4], **fixed}
    return random_scene(seed, kinds=EASY, split="any", **words)


def truth(scene: Scene) -> dict[str, str]:
    """What can be read of it."""
    thing = scene.thing
    return {
        "colour": thing.colour,
        "shape": thing.shape,
        "motion": thing.motion,
        "tone": scene.tone,
    }


def softened(frames: np.ndarray, radius: float, noise: float, seed: int) -> np.ndarray:
    """Blurred and noisy, as generated clips are."""
    blur = ImageFilter.GaussianBlur(radius)
    soft = np.stack([np.asarray(Image.fromarray(f).filter(blur)) for f in frames]).astype(float)
    rng = np.random.default_rng(seed)
    return np.clip(soft + rng.normal(0, noise, soft.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("radius", "noise"), [(0.0, 0.0), (1.0, 8.0), (2.0, 15.0), (3.0, 25.0)])
def test_scenes_are_read_back(radius: float, noise: float) -> None:
    right = dict.fromkeys(("colour", "shape", "motion", "tone"), 0)
    total = 60
    for seed in range(total):
        # Under the strongest blur a small shape has no corners left.
        size = ("small", "medium", "large")[seed // 12 % 3] if radius < 2 else "large"
        scene = scene_of(1000 + seed, size=size)
        read = measure(softened(render_clip(scene, 17, 8.0), radius, noise, seed))
        for name, word in truth(scene).items():
            right[name] += getattr(read, name) == word
    assert right["colour"] >= 0.98 * total
    assert right["motion"] >= 0.98 * total
    assert right["shape"] >= 0.95 * total
    assert right["tone"] >= 0.95 * total


def test_stills_are_read_back() -> None:
    for seed in range(60):
        scene = scene_of(seed)
        read = measure(render_image(scene)[None])
        assert (read.colour, read.shape) == (scene.thing.colour, scene.thing.shape)
        assert read.motion == "still"


@pytest.mark.parametrize("size", [32, 128])
def test_size_does_not_matter(size: int) -> None:
    for seed in range(12):
        scene = scene_of(seed)
        read = measure(render_clip(scene, 9, 8.0, size, size))
        assert (read.colour, read.motion) == (scene.thing.colour, scene.thing.motion)


@pytest.mark.parametrize(
    ("shape", "third", "fourth"), [("circle", 0, 0), ("square", 0, 0.6), ("triangle", 0.8, 0)]
)
def test_moments_of_sharp_shapes_are_the_ideal_ones(
    shape: str, third: float, fourth: float
) -> None:
    frame_HW3 = render_clip(scene_of(1, shape=shape, colour="red"), 1, 1.0, 512, 512)[0]
    chroma_HW = np.ptp(frame_HW3.astype(int), axis=-1)
    moments = rotational_moments(chroma_HW > 100)
    assert moments[1:] == pytest.approx((third, fourth), abs=0.02)


def test_captions_are_sentences_about_what_is_there() -> None:
    scene = scene_of(4, colour="blue", shape="circle", motion="up", tone="dark")
    captioner = MeasuredCaptioner()
    assert captioner.caption(render_clip(scene, 17, 8.0)) == (
        "A blue circle moves up over a dark background."
    )
    assert captioner.caption(render_image(scene)[None]) == "A blue circle over a dark background."
    still = np.repeat(render_image(scene)[None], 9, axis=0)
    assert captioner.caption(still) == "A blue circle stays still over a dark background."


def test_scenes_without_a_coloured_thing_get_a_plain_sentence() -> None:
    caption = MeasuredCaptioner().caption
    grey = np.full((9, 40, 60, 3), 115, dtype=np.uint8)
    assert caption(grey) == "A mostly grey scene without motion."
    assert caption(grey[:1]) == "A mostly grey picture."
    noise = np.random.default_rng(0).integers(0, 255, (9, 40, 60, 3), dtype=np.uint8)
    assert "fast motion" in caption(noise)
    red = np.broadcast_to(np.array([220, 30, 30], dtype=np.uint8), (5, 32, 32, 3))
    assert "red" in caption(red)
