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
from data_prep.sources.moving_shapes import (
    random_spec,
    render_clip,
    render_image,
)


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
        spec = random_spec(1000 + seed)
        scene = measure(softened(render_clip(spec, 17, 8.0), radius, noise, seed))
        for name in right:
            right[name] += getattr(scene, name) == getattr(spec, name)
    assert right["colour"] >= 0.98 * total
    assert right["motion"] >= 0.98 * total
    assert right["shape"] >= 0.95 * total
    assert right["tone"] >= 0.95 * total


def test_stills_are_read_back() -> None:
    for seed in range(60):
        spec = random_spec(seed)
        scene = measure(render_image(spec)[None])
        assert (scene.colour, scene.shape, scene.motion) == (spec.colour, spec.shape, "still")


@pytest.mark.parametrize("size", [32, 128])
def test_size_does_not_matter(size: int) -> None:
    for seed in range(12):
        spec = random_spec(seed)
        scene = measure(render_clip(spec, 9, 8.0, size, size))
        assert (scene.colour, scene.motion) == (spec.colour, spec.motion)


@pytest.mark.parametrize(
    ("shape", "third", "fourth"), [("circle", 0, 0), ("square", 0, 0.6), ("triangle", 0.8, 0)]
)
def test_moments_of_sharp_shapes_are_the_ideal_ones(
    shape: str, third: float, fourth: float
) -> None:
    frame_HW3 = render_clip(random_spec(1, shape=shape, colour="red"), 1, 1.0, 512, 512)[0]
    chroma_HW = np.ptp(frame_HW3.astype(int), axis=-1)
    moments = rotational_moments(chroma_HW > 100)
    assert moments[1:] == pytest.approx((third, fourth), abs=0.02)


def test_captions_are_sentences_about_what_is_there() -> None:
    spec = random_spec(4, colour="blue", shape="circle", motion="up", tone="dark")
    captioner = MeasuredCaptioner()
    assert captioner.caption(render_clip(spec, 17, 8.0)) == (
        "A blue circle moves up over a dark background."
    )
    assert captioner.caption(render_image(spec)[None]) == "A blue circle over a dark background."
    still = np.repeat(render_image(spec)[None], 9, axis=0)
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
