"""What is never shown in training is fixed, and no word or pair of words is."""

from __future__ import annotations

import hashlib
from itertools import combinations, product

from data_prep.world.split import in_split, is_seen
from data_prep.world.vocabulary import COLOURS, MOTIONS, SHAPES

ALL = [*product(COLOURS, SHAPES, MOTIONS)]


def test_about_fifteen_in_a_hundred_are_unseen() -> None:
    assert 0.12 < sum(not is_seen(*words) for words in ALL) / len(ALL) < 0.18


def test_every_word_and_every_pair_is_seen_more_than_once() -> None:
    for places in combinations(range(3), 2):
        pairs = {tuple(words[place] for place in places) for words in ALL}
        for pair in pairs:
            seen = [w for w in ALL if tuple(w[p] for p in places) == pair and is_seen(*w)]
            assert len(seen) >= 2, pair


def test_every_word_is_also_in_unseen_combinations() -> None:
    unseen = [words for words in ALL if not is_seen(*words)]
    for place, among in enumerate((COLOURS, SHAPES, MOTIONS)):
        assert {words[place] for words in unseen} == set(among)


def test_the_split_is_the_same_for_good() -> None:
    """Weights that were trained under one split cannot be measured under another."""
    names = "\n".join(" ".join(words) for words in ALL if not is_seen(*words))
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "01ebead6e3d5d94e"


def test_each_combination_is_in_one_split_and_in_any() -> None:
    for words in ALL:
        assert in_split(*words, "any")
        assert in_split(*words, "seen") != in_split(*words, "unseen")
