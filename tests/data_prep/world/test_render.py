"""Pixels are where scene, camera and size say, and every word can be seen in them."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from data_prep.world.background import background_of
from data_prep.world.draw import random_scene
from data_prep.world.mechanics import frame_times, in_picture
from data_prep.world.render import BAR_TONES, render_clip, render_image
from data_prep.world.scene import SceneKinds
from data_prep.world.vocabulary import CAMERAS, COLOURS, EXTENTS, SHAPES, TEXTURES, TONES
from media.frames import Frames

SCENES = [random_scene(seed) for seed in range(24)]


def coloured(frame_HWC: Frames) -> np.ndarray:
    """Where a frame has colour, bool [H, W]."""
    return np.asarray(np.ptp(frame_HWC.astype(int), axis=-1) > 80)


def test_a_clip_is_a_function_of_its_scene() -> None:
    for scene in SCENES:
        assert np.array_equal(render_clip(scene, 5, 8.0), render_clip(scene, 5, 8.0))


def test_an_image_is_the_clip_halfway() -> None:
    for scene in SCENES:
        assert np.array_equal(render_image(scene), render_clip(scene, 3, 8.0)[1])


def test_frames_of_one_moment_are_equal_at_every_frame_rate() -> None:
    for scene in SCENES:
        assert np.array_equal(render_clip(scene, 5, 4.0), render_clip(scene, 17, 16.0)[::4])


@pytest.mark.parametrize("size", [(96, 96), (64, 112), (112, 64)])
def test_twice_the_size_is_the_same_picture(size: tuple[int, int]) -> None:
    for scene in SCENES:
        small = render_clip(scene, 3, 2.0, *size).astype(float)
        large = render_clip(scene, 3, 2.0, 2 * size[0], 2 * size[1]).astype(float)
        halved = large.reshape(3, size[0], 2, size[1], 2, 3).mean((2, 4))
        # Edges are one pixel soft at either size.
        assert np.abs(halved - small).mean() < 1.0
        assert np.quantile(np.abs(halved - small), 0.9) <= 1.0


def test_a_thing_is_drawn_where_the_mechanics_say() -> None:
    alone = SceneKinds(two_things=0, occluders=0)
    for seed in range(40):
        scene = random_scene(seed, kinds=alone, shape="circle")
        frames = render_clip(scene, 9, 4.0, 128, 128)
        places_T2 = in_picture(scene, frame_times(9, 4.0))[0] * 128 + 63.5
        for frame, place in zip(frames, places_T2, strict=True):
            mask_HW = coloured(frame)
            if not (mask_HW[[0, -1]].any() or mask_HW[:, [0, -1]].any()):
                assert np.argwhere(mask_HW).mean(0) == pytest.approx(place, abs=0.3)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_fills_its_extent(shape: str) -> None:
    scene = random_scene(2, shape=shape, colour="red", motion="still", camera="static", split="any")
    rows, columns = np.nonzero(coloured(render_image(scene, 512, 512)))
    extents = np.array(EXTENTS[shape]) * scene.thing.radius * 512
    assert (np.ptp(rows) + 1) / 2 == pytest.approx(extents[0], abs=1.2)
    assert (np.ptp(columns) + 1) / 2 == pytest.approx(extents[1], abs=1.2)
    area = len(rows) / (np.pi * (scene.thing.radius * 512) ** 2)
    assert 0.75 < area < 1.05, "sizes could be taken for each other"


def test_a_pan_moves_background_and_thing_together() -> None:
    for seed in range(8):
        scene = random_scene(seed, motion="still", camera="pan right")
        scene = replace(scene, camera_rate=1.0)
        # One pixel of 64 in a frame.
        frames = render_clip(scene, 5, 64.0).astype(int)
        assert np.abs(frames[1:, :, :-1] - frames[:-1, :, 1:]).max() <= 1
        left = render_clip(replace(scene, camera="pan left"), 5, 64.0)
        assert np.array_equal(left[::-1], frames)


def test_a_zoom_is_the_middle_of_a_larger_picture() -> None:
    for seed in range(8):
        scene = random_scene(seed, motion="still", camera="zoom in")
        near = render_clip(replace(scene, camera_rate=2 * np.log(2)), 2, 1.0)[1].astype(int)
        large = render_image(scene, 128, 128)[32:96, 32:96].astype(int)
        assert np.abs(near - large).max() <= 1


@pytest.mark.parametrize("camera", [camera for camera in CAMERAS if camera != "static"])
def test_a_moving_camera_shows_in_the_background(camera: str) -> None:
    for seed in range(20):
        scene = random_scene(seed, camera=camera, motion="still")
        first, last = render_clip(replace(scene, things=()), 33, 16.0)[[0, -1]].astype(float)
        assert np.abs(first - last).mean() > 2.5


@pytest.mark.parametrize("texture", TEXTURES)
def test_backgrounds_are_soft_and_hardly_coloured(texture: str) -> None:
    for seed in range(20):
        scene = random_scene(seed, texture=texture)
        rows = (np.arange(64) + 0.5) / 64 - 0.5
        picture_HWC = background_of(scene).picture(rows, rows)
        assert np.ptp(picture_HWC, axis=-1).max() <= 12
        steps = [np.abs(np.diff(picture_HWC, axis=axis)).max() for axis in (0, 1)]
        assert max(steps) < 14, "an edge in the background"
        assert picture_HWC.mean() / 255 == pytest.approx(TONES[scene.tone], abs=0.12)


def test_a_bar_hides_what_is_behind_it_and_is_told_from_the_background() -> None:
    kinds = SceneKinds(two_things=0, occluders=1)
    for seed in range(20):
        scene = random_scene(seed, kinds=kinds)
        assert not coloured(render_image(scene)).any()
        assert coloured(render_clip(scene, 33, 16.0)[0]).any()
        assert abs(BAR_TONES[scene.tone] - TONES[scene.tone]) > 0.25


def test_colours_are_far_apart_in_hue_and_about_as_saturated() -> None:
    hues = {name: 360 * colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOURS.items()}
    for one, other in combinations(hues, 2):
        apart = abs(hues[one] - hues[other])
        assert min(apart, 360 - apart) >= 28, (one, other)
    chroma = [max(rgb) - min(rgb) for rgb in COLOURS.values()]
    assert max(chroma) < 1.3 * min(chroma)
