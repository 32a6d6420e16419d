"""What to sample and how: `SampleSpec`, and the context windows of a long video.

Knows numbers and their rules; computes no sample. Knows nothing of torch.

    SampleError(FlowreelError, ValueError)    a request that cannot be met
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flowreel.errors import FlowreelError

Schedule = Literal["jacobi", "sliding", "sequential"]
"""How the deep block is inverted; at tolerance 0 all schedules give the sequential result."""


class SampleError(FlowreelError, ValueError):
    """A sampling request that cannot be met; the message names field, value and rule."""


class ContextWindow(NamedTuple):
    """Frames that the deep block sees at once, as frame numbers of the whole video."""

    start: int
    """First frame in sight."""
    new: int
    """First frame that is made in this window; those before it are context."""
    end: int
    """One after the last frame."""


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """What to sample and how; checked when made (`SampleError`).

    Two kinds of window are meant in what follows. A *context window* is the frames that the deep
    block sees at once: a video longer than it is made window by window. The *sliding window* is the
    tokens that the schedule `sliding` solves at once.

    Source: `docs/design.md`, "Sampling".

    >>> spec = SampleSpec(num_frames=8, grid=(4, 4), window_frames=4, context_frames=2)
    >>> [tuple(window) for window in spec.context_windows()]
    [(0, 0, 4), (2, 4, 6), (4, 6, 8)]
    """

    num_frames: int
    """Latent frames T of the whole video."""
    grid: tuple[int, int]
    """Latent cells (h, w)."""
    seed: int = 0
    """Frame n's noise comes from (seed, n) alone."""
    guidance: float = 0.0
    """Weight w >= 0; above 0 both a text and a null text are needed."""
    schedule: Schedule = "sliding"
    """How the deep block is inverted; at tolerance 0 all schedules give the sequential result."""
    block_size: int = 16
    """Tokens that `jacobi` solves at once in a frame that has no frame before it."""
    later_block_factor: int = 4
    """How many times larger these blocks are in later frames; they never cross frames.

    Later frames have good start values, those of the frame before.
    """
    tolerance: float = 1e-3
    """Squared change of a `jacobi` sweep over squared tokens at which a block is solved.

    0 asks for the exact solution, of every schedule.
    """
    slide_tokens: int = 64
    """Tokens of the sliding window, at most a frame.

    It crosses frames, but never the context windows of a long video.
    """
    cold_slide_tokens: int = 20
    """The same while the first frame is made: with poor start values a long window is wasted."""
    token_tolerance: float = 0.075
    """Root mean square of a token's residual at which the sliding window accepts it.

    The residual is r = (s - mu)/sigma - z, in standard deviations of the prior.
    """
    cold_token_tolerance: float = 0.02
    """The same while the first frame is made, whose errors all later frames read."""
    window_frames: int | None = None
    """Latent frames of a context window; None for all of the video."""
    context_frames: int = 1
    """Last frames of a full context window that the next one reads again."""

    def __post_init__(self) -> None:
        for key in (
            "num_frames",
            "block_size",
            "later_block_factor",
            "context_frames",
            "slide_tokens",
            "cold_slide_tokens",
        ):
            value = getattr(self, key)
            self._require(key, type(value) is int and value >= 1, "an int of at least 1")
        self._require(
            "grid", len(self.grid) == 2 and min(self.grid) >= 1, "two positive numbers (h, w)"
        )
        for key in ("guidance", "tolerance", "token_tolerance", "cold_token_tolerance"):
            value = getattr(self, key)
            self._require(key, math.isfinite(value) and value >= 0, "finite and not negative")
        self._require(
            "schedule",
            self.schedule in ("jacobi", "sliding", "sequential"),
            "'jacobi', 'sliding' or 'sequential'",
        )
        if self.window_frames is not None and self.window_frames < self.num_frames:
            self._require(
                "context_frames",
                self.context_frames < self.window_frames,
                f"less than window_frames ({self.window_frames})",
            )

    def _require(self, key: str, holds: bool, rule: str) -> None:
        if not holds:
            raise SampleError(f"{key} = {getattr(self, key)!r}: must be {rule}")

    @property
    def frames_per_window(self) -> int:
        """Frames of one context window: `window_frames`, at most the whole video."""
        return min(self.window_frames or self.num_frames, self.num_frames)

    def window_start(self, n: int) -> int:
        """First frame (context included) of the context window in which frame n is made."""
        if n < self.frames_per_window:
            return 0
        step = self.frames_per_window - self.context_frames
        return (1 + (n - self.frames_per_window) // step) * step

    def context_windows(self) -> Iterator[ContextWindow]:
        """Every context window of the video; each frame is new in exactly one of them."""
        new = 0
        while new < self.num_frames:
            start = self.window_start(new)
            end = min(start + self.frames_per_window, self.num_frames)
            yield ContextWindow(start, new, end)
            new = end
