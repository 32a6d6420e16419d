"""A seed draws a scene that can be read: words as asked, things in the picture, a way to see."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from data_prep.world.draw import random_scene
from data_prep.world.mechanics import frame_times, in_picture, track, view
from data_prep.world.scene import EASY, Scene, SceneKinds, is_scene, scene_from
from data_prep.world.vocabulary import (
    CAMERA_MOTIONS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SHOWING_TEXTURES,
    SIZES,
    SPEEDS,
    TEXTURES,
    TONES,
    WorldError,
)

SCENES = [random_scene(seed) for seed in range(1500)]
TIMES = frame_times(33, 16.0)


def test_a_scene_is_a_function_of_its_seed() -> None:
    assert [random_scene(seed) for seed in range(20)] == SCENES[:20]
    assert len(set(SCENES)) == len(SCENES)


def test_a_scene_comes_back_from_json() -> None:
    for scene in SCENES[:200]:
        record = json.loads(json.dumps(asdict(scene)))
        assert is_scene(record)
        assert scene_from(record) == scene
    assert not is_scene({"things": []})


@pytest.mark.parametrize(
    ("name", "words"),
    [("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("size", SIZES)],
)
def test_every_word_of_a_thing_is_drawn_often(name: str, words: tuple[str, ...]) -> None:
    drawn = [getattr(thing, name) for scene in SCENES for thing in scene.things]
    assert all(drawn.count(word) > 0.4 * len(drawn) / len(words) for word in words)


def test_every_camera_background_and_rarity_is_drawn() -> None:
    assert {scene.camera for scene in SCENES} == set(CAMERAS)
    assert {(s.tone, s.texture) for s in SCENES} == {(a, b) for a in TONES for b in TEXTURES}
    assert {len(scene.things) for scene in SCENES} == {1, 2}
    assert any(scene.meeting for scene in SCENES)
    assert any(scene.occluder for scene in SCENES)


def test_only_seen_combinations_are_drawn_unless_asked() -> None:
    assert all(thing.is_seen for scene in SCENES for thing in scene.things)
    unseen = [random_scene(seed, split="unseen") for seed in range(100)]
    assert not any(thing.is_seen for scene in unseen for thing in scene.things)
    either = [random_scene(seed, split="any").thing.is_seen for seed in range(200)]
    assert {True, False} == set(either)


@pytest.mark.parametrize("seed", range(8))
def test_fixed_words_are_the_scenes_words(seed: int) -> None:
    words = {"colour": "pink", "shape": "ring", "size": "large", "motion": "up-left"}
    scene = random_scene(seed, split="any", speed="slowly", tone="dark", texture="cloudy", **words)  # type: ignore[arg-type]
    assert {name: getattr(scene.thing, name) for name in words} == words
    assert (scene.thing.speed, scene.tone, scene.texture) == ("slowly", "dark", "cloudy")


def test_a_fixed_camera_brings_what_shows_it() -> None:
    for camera in CAMERAS:
        for seed in range(30):
            scene = random_scene(seed, camera=camera)
            assert scene.camera == camera
            assert camera == "static" or scene.texture in SHOWING_TEXTURES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"colour": "brown"}, "unknown colour 'brown': allowed are red, orange"),
        ({"weight": "heavy"}, "unknown attribute 'weight': allowed are colour"),
        ({"camera": "pan left", "motion": "right"}, "cannot be told from the camera's own"),
        ({"camera": "zoom in", "texture": "smooth"}, "cannot be seen: give one of striped"),
        ({"colour": "red", "shape": "circle", "motion": "left", "split": "unseen"}, "fix fewer"),
    ],
)
def test_words_that_no_scene_has_are_refused(words: dict[str, str], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        random_scene(0, **words)  # type: ignore[arg-type]


def test_kinds_narrow_what_is_drawn() -> None:
    drawn = [random_scene(seed, kinds=EASY) for seed in range(300)]
    assert {scene.thing.motion for scene in drawn} == {*DIRECTIONS, "still"}
    assert {scene.camera for scene in drawn} == {"static"}
    assert {len(scene.things) for scene in drawn} == {1}
    assert not any(scene.occluder for scene in drawn)
    plain = replace(EASY, textures=("smooth",), motions=("circle",))
    assert random_scene(3, kinds=plain).texture == "smooth"
    assert random_scene(3, kinds=plain).thing.motion == "circle"
    assert all(len(random_scene(s, kinds=SceneKinds(two_things=1)).things) == 2 for s in range(50))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"motions": ("hop",)}, "unknown motion 'hop'"),
        ({"cameras": ()}, "no camera given"),
        ({"two_things": 1.5}, "two_things is 1.5: give a share from 0 to 1"),
    ],
)
def test_kinds_that_do_not_exist_are_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        SceneKinds(**words)  # type: ignore[arg-type]


def outside(scene: Scene) -> float:
    """The largest share of a thing's breadth that leaves the picture within the clip."""
    places_NT2 = in_picture(scene, TIMES)
    extents_NT2 = view(scene, TIMES).scale_T[:, None] * np.array(
        [[thing.extent] for thing in scene.things]
    )
    return float(np.max((np.abs(places_NT2) + extents_NT2 - 0.5) / (2 * extents_NT2)))


def test_no_outline_leaves_the_picture_by_a_third() -> None:
    assert max(outside(scene) for scene in SCENES) < 1 / 3


def test_straight_motion_is_far_enough_to_be_seen_and_goes_its_way() -> None:
    for scene in SCENES:
        positions_NT2 = track(scene, TIMES).positions_NT2
        for thing, path_T2 in zip(scene.things, positions_NT2, strict=True):
            way = path_T2[-1] - path_T2[0]
            if thing.motion in DIRECTIONS:
                toward = np.array(DIRECTIONS[thing.motion])
                assert np.hypot(*way) >= 0.2
                assert way @ toward == pytest.approx(np.hypot(*way) * np.hypot(*toward))
            elif thing.motion == "still":
                assert not way.any()


def test_quick_things_go_clearly_further_than_slow_ones() -> None:
    rates: dict[str, list[float]] = {speed: [] for speed in SPEEDS}
    for thing in (thing for scene in SCENES for thing in scene.things):
        if thing.motion in DIRECTIONS:
            rates[thing.speed].append(float(np.hypot(*thing.velocity)))
    assert min(rates["quickly"]) > 1.5 * max(rates["slowly"])


def test_a_bouncing_thing_turns_round_well_within_the_clip() -> None:
    bouncing = [s for s in SCENES if s.thing.motion == "bounce" and not s.meeting]
    assert len(bouncing) > 50
    for scene in bouncing:
        axis = int(np.argmax(np.abs(scene.thing.velocity)))
        signs = np.sign(track(scene, TIMES).velocities_NT2[0, :, axis])
        (turns,) = np.nonzero(np.diff(signs))
        assert any(5 <= turn <= 27 for turn in turns)


def test_a_motion_can_be_told_from_the_cameras() -> None:
    moving = [scene for scene in SCENES if scene.camera != "static"]
    assert len(moving) > 100
    for scene in moving:
        assert scene.texture in SHOWING_TEXTURES
        assert scene.thing.motion in CAMERA_MOTIONS[scene.camera]
        places_T2 = in_picture(scene, TIMES)[0]
        way = places_T2[-1] - places_T2[0]
        if "pan" in scene.camera and scene.thing.motion != "still":
            # Nearer to its own direction than to a diagonal.
            assert abs(way[1]) < abs(way[0]) * np.tan(np.pi / 8)


def test_two_things_differ_and_keep_apart() -> None:
    pairs = [scene for scene in SCENES if len(scene.things) == 2]
    for scene in pairs:
        first, second = scene.things
        assert first.colour != second.colour
        assert first.shape != second.shape
        assert not first.motion == second.motion == "still"
        one_T2, other_T2 = track(scene, TIMES).positions_NT2
        gap_T2 = np.abs(one_T2 - other_T2) - np.add(first.extent, second.extent)
        assert gap_T2.max(axis=1).min() > -1e-9
