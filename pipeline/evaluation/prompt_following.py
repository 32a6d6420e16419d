"""Whether videos show what their prompts ask for: shares read right, attribute by attribute.

A judge reads words back from pixels; here they are held against the words of the prompts. Where
the judge is not sure, the attribute counts as missed, and is counted as unsure too. Knows nothing
of models, pixels or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

ATTRIBUTES = ("colour", "shape", "size", "motion", "camera")
Z_95 = 1.959964
"""Standard deviations of the normal distribution that 95% lie within."""


class Words(Protocol):
    """A word for each attribute: what a prompt asks for, or what the judge reads.

    None is an attribute that the prompt does not name, or of which the judge is not sure.
    """

    @property
    def colour(self) -> str | None:
        """Such as red."""

    @property
    def shape(self) -> str | None:
        """Such as circle."""

    @property
    def size(self) -> str | None:
        """Such as small."""

    @property
    def motion(self) -> str | None:
        """Such as left."""

    @property
    def camera(self) -> str | None:
        """Such as static."""


@dataclass(frozen=True)
class Share:
    """How many of `count` were read right, and of how many the judge was not sure.

    >>> share = Share(right=9, unsure=1, count=10)
    >>> share.value, round(share.low, 3), round(share.high, 3)
    (0.9, 0.596, 0.982)
    """

    right: int
    unsure: int
    count: int

    @property
    def value(self) -> float:
        """The share read right."""
        return self.right / self.count

    @property
    def low(self) -> float:
        """Lower end of Wilson's interval of 95%; rounding may not lift it above the share."""
        return max(0.0, min(self.value, self._wilson(-1)))

    @property
    def high(self) -> float:
        """Upper end of Wilson's interval of 95%; rounding may not sink it below the share."""
        return min(1.0, max(self.value, self._wilson(+1)))

    def _wilson(self, side: int) -> float:
        n, p, z = self.count, self.value, Z_95
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (p + z * z / (2 * n) + side * half) / (1 + z * z / n)


Shares = dict[str, Share]
"""By attribute; an attribute that no prompt names is not there."""


@dataclass(frozen=True)
class PromptFollowing:
    """Shares of generated videos beside chance, and the same judge on real clips as the ceiling.

    Attributes:
        seen, unseen: of generated videos whose combination of words was, or was not, trained on.
        real: of rendered clips of the same prompts, seen and unseen together.
        codec: of the same clips after the codec's round trip.
        chance: what guessing one of the words asked for comes to.
    """

    seen: Shares
    unseen: Shares
    real: Shares
    codec: Shares
    chance: dict[str, float]


def shares(asked: Sequence[Words], read: Sequence[Words]) -> Shares:
    """For each attribute, how many of the prompts that name it have it read right."""
    found = {}
    for attribute in ATTRIBUTES:
        pairs = [
            (getattr(prompt, attribute), getattr(reading, attribute))
            for prompt, reading in zip(asked, read, strict=True)
            if getattr(prompt, attribute) is not None
        ]
        if pairs:
            found[attribute] = Share(
                right=sum(wanted == seen for wanted, seen in pairs),
                unsure=sum(seen is None for _wanted, seen in pairs),
                count=len(pairs),
            )
    return found


def words_read(asked: Words, read: Words) -> tuple[tuple[str, bool], ...]:
    """What is read of each attribute that a prompt names, and whether it is right.

    Where the judge is not sure, the attribute's name with a question mark.
    """
    return tuple(
        (getattr(read, name) or f"{name}?", getattr(read, name) == getattr(asked, name))
        for name in ATTRIBUTES
        if getattr(asked, name) is not None
    )


def chances(asked: Sequence[Words]) -> dict[str, float]:
    """The share that guessing evenly among the words asked for gets right, by attribute.

    An attribute with a single word to ask for tells nothing of a model: its chance is 1.
    """
    words = {a: {getattr(prompt, a) for prompt in asked} - {None} for a in ATTRIBUTES}
    return {attribute: 1 / len(found) for attribute, found in words.items() if found}
