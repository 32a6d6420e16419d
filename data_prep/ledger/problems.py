"""What is wrong with a finished shard itself, rather than with its samples: nothing hides it.

Knows nothing of how a shard is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_prep.ledger.manifest import Manifest


@dataclass(frozen=True)
class ShardProblem:
    """A shard of which nothing, or not everything, could be read."""

    shard: str
    """Its name in the output."""
    problem: Literal["unreadable", "truncated"]
    """`unreadable` where no sample came out of it, else `truncated`."""
    why: str


def problem_of(manifest: Manifest) -> ShardProblem | None:
    """What was wrong with the shard of a manifest; None where all of it was read."""
    if not (manifest.error or manifest.truncated):
        return None
    samples = manifest.num_samples
    why = manifest.error or "it ends too early, or is damaged on the way"
    if not samples:
        return ShardProblem(manifest.shard, "unreadable", why)
    return ShardProblem(manifest.shard, "truncated", f"{why}; {samples} samples were found")
