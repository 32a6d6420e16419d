"""What to sample and how: `SampleSpec`. Knows numbers and their rules; computes nothing, and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flowreel.errors import FlowreelError


class SampleError(FlowreelError, ValueError):
    """A sampling request that cannot be met; the message names the field, its value and the rule."""


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """What to sample and how; checked when made (`SampleError`)."""

    num_frames: int
    """Latent frames T of the whole video."""
    grid: tuple[int, int]
    """Latent cells (h, w)."""
    seed: int = 0
    guidance: float = 0.0
    """Weight w >= 0; above 0 both a text and a null text are needed."""
    schedule: Literal["jacobi", "sliding", "sequential"] = "sliding"
    block_size: int = 16
    """Tokens that Jacobi solves together in a frame without a frame before it."""
    later_block_factor: int = 4
    """How many times larger blocks are in later frames, which start warm. Blocks never cross frames."""
    tolerance: float = 1e-3
    """Squared change of a sweep over squared tokens at which a block is done; 0 asks for the exact solution of
    every schedule."""
    slide_tokens: int = 64
    """Tokens of the sliding window (at most a frame). It crosses frames, but never the windows of a long video."""
    cold_slide_tokens: int = 20
    """The same while the first frame is made: with poor start values a long window is wasted."""
    token_tolerance: float = 0.075
    """Root mean square of a token's residual r = (s - mu)/sigma - z at which the sliding window accepts it."""
    cold_token_tolerance: float = 0.02
    """The same while the first frame is made, whose errors all later frames read."""
    window_frames: int | None = None
    """Latent frames that the deep block sees at once; None for all of them."""
    context_frames: int = 1
    """Last frames of a full window that the next window re-reads."""

    def __post_init__(self) -> None:
        for key in (
            "num_frames",
            "block_size",
            "later_block_factor",
            "context_frames",
            "slide_tokens",
            "cold_slide_tokens",
        ):
            self._require(
                key,
                type(getattr(self, key)) is int and getattr(self, key) >= 1,
                "an int of at least 1",
            )
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
    def window(self) -> int:
        """Frames of one window, at most the whole video."""
        return min(self.window_frames or self.num_frames, self.num_frames)

    def window_start(self, n: int) -> int:
        """First frame (context included) of the window in which frame n is made."""
        if n < self.window:
            return 0
        step = self.window - self.context_frames
        return (1 + (n - self.window) // step) * step

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """(first frame in sight, first new frame, end) of every window of the video."""
        new = 0
        while new < self.num_frames:
            start = self.window_start(new)
            end = min(start + self.window, self.num_frames)
            yield start, new, end
            new = end
