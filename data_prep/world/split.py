"""Seen and unseen combinations of colour, shape and motion, the same for good.

A model that has learnt what the words mean draws a combination that it was never shown. So about
15% of them are never in the training data; every colour, shape and motion, and every pair of them,
is. Which they are is a hash of their names, so that new words leave the others where they are.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["seen", "unseen", "any"]

UNSEEN_SHARE = 0.15
"""About so many of the combinations are never shown in training."""
_SALT = 9395
"""Chosen so that each word has about as many unseen combinations; another one is another split."""


def is_seen(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination may stand in training data.

    >>> is_seen("red", "circle", "left")
    True
    """
    digest = hashlib.blake2b(f"{_SALT} {colour} {shape} {motion}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >= UNSEEN_SHARE * 2**64


def in_split(colour: str, shape: str, motion: str, split: Split) -> bool:
    """Whether a combination belongs to a split; `any` holds them all."""
    return split == "any" or is_seen(colour, shape, motion) == (split == "seen")
