"""Readings held against the scenes that were rendered, or asked for: accuracy and confusions.

A word that is None, not sure, counts as wrong. Knows nothing of pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import permutations

from data_prep.world.judge import Reading
from data_prep.world.scene import Scene

ATTRIBUTES = ("colour", "shape", "size", "motion", "camera")


def expected(scene: Scene) -> list[dict[str, str]]:
    """What a reading of each thing of the scene should say.

    >>> from data_prep.world.draw import random_scene
    >>> expected(random_scene(1, colour="red", motion="left", camera="static"))[0]["motion"]
    'left'
    """
    return [
        {**{name: getattr(thing, name) for name in ATTRIBUTES[:4]}, "camera": scene.camera}
        for thing in scene.things
    ]


def paired(scene: Scene, readings: Sequence[Reading]) -> list[tuple[dict[str, str], Reading]]:
    """Each thing of a scene with the reading that is its own.

    Of two things it is the pairing in which most words agree. A thing that no reading is left for
    gets an empty one.
    """
    words = expected(scene)
    padded = [*readings, *[Reading()] * (len(words) - len(readings))]
    return max(
        ([*zip(words, chosen, strict=True)] for chosen in permutations(padded, len(words))),
        key=lambda pairs: sum(_agreed(*pair) for pair in pairs),
    )


def _agreed(words: dict[str, str], reading: Reading) -> int:
    return sum(getattr(reading, name) == word for name, word in words.items())


def accuracies(pairs: Iterable[tuple[dict[str, str], Reading]]) -> dict[str, float]:
    """Share of right words, by attribute; 0 of none."""
    counts = confusions(pairs)
    return {
        name: sum(n for (word, read), n in of.items() if word == read) / max(1, of.total())
        for name, of in counts.items()
    }


def confusions(
    pairs: Iterable[tuple[dict[str, str], Reading]],
) -> dict[str, Counter[tuple[str, str | None]]]:
    """How often which word was read as which, by attribute.

    >>> from data_prep.world.draw import random_scene
    >>> scene = random_scene(1, shape="ring", camera="static", motion="up")
    >>> confusions(paired(scene, [Reading(shape="circle")]))["shape"]
    Counter({('ring', 'circle'): 1})
    """
    counts: dict[str, Counter[tuple[str, str | None]]] = {name: Counter() for name in ATTRIBUTES}
    for words, reading in pairs:
        for name in ATTRIBUTES:
            counts[name][words[name], getattr(reading, name)] += 1
    return counts
