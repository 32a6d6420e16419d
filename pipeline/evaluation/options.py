"""What is measured and how much of it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.world.scene import SceneKinds
from flow.sample_spec import Schedule
from flowreel.errors import FlowreelError
from serving.config import SamplingConfig

FAMILIES = (
    "nats", "prompts", "sampler", "codec", "distances", "motion", "physics", "drift",
)  # fmt: skip
"""What `--only` chooses from, in the order in which they are measured."""
OF_VIDEO = ("prompts", "motion", "physics", "drift")
"""Families that an image model has no use for: the judge reads videos."""


class FamilyError(FlowreelError, ValueError):
    """A family of figures that there is none of, or none of this model."""


@dataclass(frozen=True)
class Options:
    """What is measured, and how much of it.

    Attributes:
        only: the families, of `FAMILIES`.
        data: a dataset whose held-out clips are measured; None renders some.
        prompts: how many of seen combinations, and of unseen ones as many.
        draws: noise draws behind a likelihood.
        seed: of prompts, scenes and noise.
        guidance: weight w.
        schedule: how the deep block is inverted.
        long_s: lengths of the long video at which it is looked at, seconds.
        kinds: which scenes are asked for.
        sampling: what the service leaves open.
    """

    only: tuple[str, ...] = FAMILIES
    data: str | None = None
    prompts: int = 64
    draws: int = 4
    seed: int = 0
    guidance: float = 2.5
    schedule: Schedule = "jacobi"
    long_s: tuple[float, ...] = (30.0, 60.0, 120.0)
    kinds: SceneKinds = field(default_factory=SceneKinds)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def check_families(only: Sequence[str]) -> None:
    """Refuse a family that there is none of."""
    for family in only:
        if family not in FAMILIES:
            raise FamilyError(f"--only {family!r}: must be one of {', '.join(FAMILIES)}")
