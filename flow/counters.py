"""What sampling took: the `Work` of one solver, the `Counters` of one video.

Knows numbers. Knows nothing of torch or models.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Work:
    """What a solver did.

    >>> work = Work(iterations=2, evaluations=64)
    >>> earlier = work.copy()
    >>> work.add(Work(iterations=1, evaluations=32))
    >>> work.since(earlier)
    Work(iterations=1, evaluations=32, prefilled=0)
    """

    iterations: int = 0
    """Passes through the transformer."""
    evaluations: int = 0
    """Token positions in those passes; a guided pair counts once."""
    prefilled: int = 0
    """Known positions (text, context) read in to start or restart."""

    def copy(self) -> Work:
        """The numbers as they stand."""
        return Work(self.iterations, self.evaluations, self.prefilled)

    def add(self, other: Work) -> None:
        """Count another solver's work with this one's."""
        self.iterations += other.iterations
        self.evaluations += other.evaluations
        self.prefilled += other.prefilled

    def since(self, earlier: Work) -> Work:
        """The difference to an earlier copy."""
        return Work(
            self.iterations - earlier.iterations,
            self.evaluations - earlier.evaluations,
            self.prefilled - earlier.prefilled,
        )


@dataclass
class Counters:
    """What sampling a video took: the deep block frame by frame, the shallow blocks in all."""

    per_frame: list[Work] = field(default_factory=list)
    """The deep block's work, one entry per frame that this stream made."""
    seconds: list[float] = field(default_factory=list, compare=False)
    """From the start of a frame to its end; time in which others shared its passes is included."""
    tokens_per_frame: int = 0
    """Tokens of a frame."""
    shallow: list[Work] = field(default_factory=list)
    """Work of each shallow block, in the order of the flow; all frames of a call are one pass."""

    @property
    def iterations(self) -> int:
        """Passes through the deep block."""
        return sum(work.iterations for work in self.per_frame)

    @property
    def token_evaluations(self) -> int:
        """Token positions in those passes; a guided pair counts once."""
        return sum(work.evaluations for work in self.per_frame)

    @property
    def prefilled(self) -> int:
        """Known positions (text, context) read in parallel."""
        return sum(work.prefilled for work in self.per_frame)

    @property
    def evaluations_per_token(self) -> float:
        """`token_evaluations` over the tokens made: 1 for `sequential`."""
        tokens = sum(work.iterations > 0 for work in self.per_frame) * self.tokens_per_frame
        return self.token_evaluations / tokens if tokens else 0.0

    @property
    def ms_per_iteration(self) -> float:
        """Milliseconds of a pass through the deep block, everything around it included."""
        return 1e3 * sum(self.seconds) / self.iterations if self.iterations else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens made per second of the deep block."""
        seconds = sum(self.seconds)
        return len(self.per_frame) * self.tokens_per_frame / seconds if seconds else 0.0
