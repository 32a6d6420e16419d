"""The parts of the benchmark, in order of worth, and the goals they are held against.

Knows nothing of torch or of how parts are run. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process of the benchmark.

    >>> [part.name for part in PARTS]
    ['machine', 'right', 'pass', 'clip', 'step', 'likelihood']
    """

    name: str
    """What `--only` calls it."""
    title: str
    """Its heading in the report."""
    share: float
    """Of the whole time: what earlier parts must leave for it."""
    module: str
    """Its file in this package; `measure(recorder, shapes, device)` is called."""


PARTS = (
    Part("machine", "The machine, and the roof of one pass", 0.06, "machine"),
    Part("right", "Is it right?", 0.14, "correctness"),
    Part("pass", "One pass of the deep block", 0.24, "one_pass"),
    Part("clip", "A whole clip of 81 frames at 480p", 0.22, "clip"),
    Part("step", "A training step", 0.22, "training_step"),
    Part("likelihood", "Likelihood of a clip, and the encoder's feeder", 0.12, "likelihood"),
)
BY_NAME = {part.name: part for part in PARTS}


@dataclass(frozen=True)
class Goal:
    """A bound on a figure.

    >>> goal = Goal("at most", 8.5, "ms")
    >>> str(goal), goal.met(8.0), goal.met(9.0), goal.met(None)
    ('at most 8.5 ms', True, False, None)
    """

    kind: str
    """"at most" or "at least"."""
    bound: float
    unit: str

    def __str__(self) -> str:
        return f"{self.kind} {self.bound:g} {self.unit}"

    def met(self, value: float | None) -> bool | None:
        """Whether a figure keeps the bound; None where there is no figure."""
        if value is None:
            return None
        return value <= self.bound if self.kind == "at most" else value >= self.bound


PASS_GOAL = Goal("at most", 8.5, "ms")
"""One guided pass of 128 tokens after 17,000 others. The roof of an H200 there is 5.4 ms."""
STEP_GOAL = Goal("at least", 400.0, "TFLOP/s")
"""A training step at 33,000 tokens, causal attention counted in half."""
BUSY_GOAL = Goal("at least", 0.95, "of the time")
"""The share of the time in which the encoder is busy, while decoders feed it."""
CARDS_GB = (80, 48, 24)
"""Memory of the cards that a clip is held against."""
