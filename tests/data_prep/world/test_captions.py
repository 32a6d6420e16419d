"""Captions are English sentences that say what the scene has, and pictures' tell of no motion."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from data_prep.world.captions import canonical, canonical_image, caption, image_caption
from data_prep.world.draw import random_scene
from data_prep.world.scene import Scene, SceneKinds

SCENES = [random_scene(seed) for seed in range(400)]
SYNONYMS = {
    "small": ("small", "little"),
    "medium": ("medium",),
    "large": ("large", "big"),
    "left": ("left",),
    "right": ("right",),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "still": ("stays still", "standing still"),
    "orbit": ("in a circle",),
    "bounce": ("bounces", "bouncing"),
}
MOVES = re.compile(r"\b(mov|bounc|go(es|ing)|stay|still|pan|zoom|slow|quick|camera)")


def says(text: str, word: str) -> bool:
    return any(re.search(rf"\b{form}\b", text.lower()) for form in SYNONYMS.get(word, (word,)))


@pytest.mark.parametrize("write", [canonical, caption, canonical_image, image_caption])
def test_captions_are_sentences(write: Callable[[Scene], str]) -> None:
    for scene in SCENES:
        text = write(scene)
        assert re.fullmatch(r"[A-Z][a-z ,;.-]*( [A-Z][a-z ,;-]*)*.*\.", text), text
        assert "  " not in text
        assert not re.search(r"\b[aA] [aeiou]", text), text
        assert not re.search(r"[,;.]{2}|\s[,;.]", text), text


def test_a_caption_says_all_there_is_in_whatever_wording() -> None:
    for scene in SCENES:
        for number in range(5):
            text = caption(replace(scene, seed=number))
            for thing in scene.things:
                words = [thing.colour, thing.shape, thing.size]
                if not scene.meeting:
                    motion = thing.motion.replace("circle", "orbit")
                    words += [*motion.split("-"), *([thing.speed] if thing.speed else [])]
                assert all(says(text, word) for word in words), (text, words)
            assert says(text, scene.tone)
            assert says(text, scene.texture)
            assert ("behind a grey bar" in text) == (scene.occluder is not None)
            assert ("off each other" in text) == scene.meeting
            camera = scene.camera.split()
            assert ("camera" in text) == (camera != ["static"])
            if camera != ["static"]:
                assert re.search(rf"{camera[0]}\w* (to the )?{camera[1]}", text), text


def test_wordings_differ_and_the_canonical_one_is_among_them() -> None:
    for scene in SCENES[:50]:
        texts = {caption(replace(scene, seed=number)) for number in range(5)}
        assert len(texts) == 4
        assert canonical(scene) in texts


def test_a_pictures_caption_tells_of_no_motion() -> None:
    for scene in SCENES:
        for number in range(3):
            text = image_caption(replace(scene, seed=number))
            assert not MOVES.search(text), text
            for thing in scene.things:
                assert all(says(text, w) for w in (thing.colour, thing.shape, thing.size))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            {"motion": "left", "speed": "quickly", "texture": "striped"},
            "A small red circle moves left quickly over a dark striped background.",
        ),
        (
            {"motion": "bounce", "speed": "slowly", "texture": "smooth"},
            "A small red circle bounces slowly over a dark smooth background.",
        ),
        (
            {"motion": "still", "texture": "cloudy", "camera": "pan right"},
            "A small red circle stays still over a dark cloudy background; the camera pans right.",
        ),
        (
            {"motion": "up-left", "speed": "slowly", "texture": "shaded"},
            "A small red circle moves up-left slowly over a dark shaded background.",
        ),
    ],
)
def test_the_canonical_wording(words: dict[str, str], text: str) -> None:
    thing = {"colour": "red", "shape": "circle", "size": "small", "tone": "dark"}
    alone = SceneKinds(cameras=("static",), two_things=0, occluders=0)
    scene = random_scene(5, kinds=alone, split="any", **thing, **words)
    assert canonical(scene) == text
