"""Prompts that ask for scenes of one thing, evenly over colours, shapes and motions.

Made for measuring whether a model does what it is told: each prompt says what has to be seen.
Knows nothing of models.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from data_prep.world.captions import canonical
from data_prep.world.draw import random_scene
from data_prep.world.scene import Scene, SceneKinds
from data_prep.world.split import Split, in_split
from data_prep.world.vocabulary import COLOURS, SHAPES


@dataclass(frozen=True)
class Prompt:
    """What is asked for, as a sentence and word by word."""

    text: str
    colour: str
    shape: str
    size: str
    motion: str
    camera: str
    seen: bool
    """Whether training data may have this combination of colour, shape and motion."""
    scene: Scene
    """One that the text describes: the real video beside the generated one."""


def prompts(
    count: int, *, split: Split = "seen", seed: int = 0, kinds: SceneKinds | None = None
) -> list[Prompt]:
    """Prompts in the canonical wording; the first ones of a longer list are the shorter list.

    Each is one of the combinations of the split that were asked for least, word by word; sizes
    take turns, backgrounds and cameras are drawn.

    Args:
        count: how many.
        split: seen combinations, unseen ones, or any.
        seed: which of the many such lists.
        kinds: motions, textures and cameras to ask for; by default all.

    >>> prompts(1, seed=3)[0].text
    'A small orange square moves right quickly over a light cloudy background.'
    """
    alone = replace(kinds or SceneKinds(), two_things=0, occluders=0)
    rng = np.random.default_rng([seed, 4711])
    combinations = [
        words for words in product(COLOURS, SHAPES, alone.motions) if in_split(*words, split)
    ]
    sizes = alone.sizes
    asked: Counter[tuple[str, ...]] = Counter()
    chosen = []
    for number in range(count):
        order = rng.permutation(len(combinations))
        colour, shape, motion = min(
            (combinations[place] for place in order), key=lambda words: _times(asked, words)
        )
        asked.update(_counted(colour, shape, motion))
        scene = random_scene(
            seed * 1_000_003 + number,
            size=sizes[number % len(sizes)],
            kinds=alone,
            split=split,
            colour=colour,
            shape=shape,
            motion=motion,
        )
        thing = scene.thing
        text = canonical(scene)
        chosen.append(
            Prompt(text, colour, shape, thing.size, motion, scene.camera, thing.is_seen, scene)
        )
    return chosen


def _counted(colour: str, shape: str, motion: str) -> list[tuple[str, ...]]:
    """What of a combination is counted: the words one by one, and all together."""
    return [("colour", colour), ("shape", shape), ("motion", motion), (colour, shape, motion)]


def _times(asked: Counter[tuple[str, ...]], words: tuple[str, str, str]) -> tuple[int, ...]:
    """How often the combination was asked for, then its words, the most frequent one first."""
    single = [asked[key] for key in _counted(*words)]
    return asked[words], *sorted(single[:3], reverse=True)
