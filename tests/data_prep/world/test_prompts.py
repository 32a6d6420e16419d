"""Prompts ask for every colour, shape and motion about as often, within their split."""

from __future__ import annotations

from collections import Counter

import pytest

from data_prep.world.captions import canonical
from data_prep.world.prompts import prompts
from data_prep.world.scene import EASY, SceneKinds
from data_prep.world.vocabulary import COLOURS, MOTIONS, SHAPES, SIZES


def test_words_are_asked_for_evenly() -> None:
    asked = prompts(256)
    among = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "size": SIZES}
    for name, words in among.items():
        counts = Counter(getattr(prompt, name) for prompt in asked)
        assert max(counts.values()) - min(counts[word] for word in words) <= 2
    assert len({(p.colour, p.shape, p.motion) for p in asked}) == 256


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_a_split_is_kept(split: str) -> None:
    asked = prompts(60, split=split)  # type: ignore[arg-type]
    assert {prompt.seen for prompt in asked} == {split == "seen"}
    assert {prompt.colour for prompt in asked} == set(COLOURS)
    assert {prompt.shape for prompt in asked} == set(SHAPES)
    assert {prompt.motion for prompt in asked} == set(MOTIONS)


def test_more_unseen_prompts_than_combinations_repeat_them_with_other_backgrounds() -> None:
    asked = prompts(150, split="unseen")
    counts = Counter((p.colour, p.shape, p.motion) for p in asked)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({p.text for p in asked}) > 140


def test_fewer_prompts_are_the_first_of_more() -> None:
    assert prompts(5) == prompts(20)[:5]
    assert prompts(5) != prompts(5, seed=1)


def test_a_prompt_says_what_its_scene_has() -> None:
    for prompt in prompts(40, split="any", seed=2, kinds=SceneKinds()):
        (thing,) = prompt.scene.things
        assert prompt.text == canonical(prompt.scene)
        words = (thing.colour, thing.shape, thing.size, thing.motion, prompt.scene.camera)
        assert words == (prompt.colour, prompt.shape, prompt.size, prompt.motion, prompt.camera)


def test_kinds_narrow_what_is_asked_for() -> None:
    asked = prompts(60, kinds=EASY)
    assert {prompt.motion for prompt in asked} == set(EASY.motions)
    assert {prompt.camera for prompt in asked} == {"static"}
