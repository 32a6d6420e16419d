"""The kinds of GPU that a plan knows, and so many of one of them. Knows nothing of torch.

PlanError(FlowreelError, ValueError)    hardware that is unknown, or a batch it cannot share
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from flowreel.errors import FlowreelError

USABLE = 0.9
"""Share of a GPU's memory to plan with: the allocator and the kernels take some."""


class PlanError(FlowreelError, ValueError):
    """Hardware that is unknown, or a batch that it cannot share."""


class Gpu(NamedTuple):
    """A kind of GPU: its memory, and its dense products in bf16 without sparsity."""

    memory_bytes: float
    peak_flops: float


GPUS = {
    "h100": Gpu(80e9, 989e12),
    "h200": Gpu(141e9, 989e12),
    "b200": Gpu(180e9, 2250e12),
    "a100": Gpu(80e9, 312e12),
    "a100-40": Gpu(40e9, 312e12),
    "l40s": Gpu(48e9, 362e12),
    "rtx4090": Gpu(24e9, 165e12),
}
"""By the makers' data sheets."""


@dataclass(frozen=True)
class Hardware:
    """So many GPUs of a kind.

    >>> Hardware.of("h200x8")
    Hardware(name='h200', count=8)
    """

    name: str
    count: int

    @classmethod
    def of(cls, words: str) -> Hardware:
        """From `h200x8`, or `h200` for one."""
        name, _, number = words.strip().lower().rpartition("x")
        if words.strip().lower() in GPUS:
            name, number = words.strip().lower(), "1"
        if name not in GPUS or not re.fullmatch(r"[1-9]\d*", number):
            raise PlanError(
                f"hardware {words!r}: write a kind and a number, such as h200x8; known kinds: "
                f"{', '.join(GPUS)}"
            )
        return cls(name, int(number))

    @property
    def gpu(self) -> Gpu:
        """The kind."""
        return GPUS[self.name]
