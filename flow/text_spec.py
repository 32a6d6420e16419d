"""Which text encoder a model reads, in plain values.

Knows nothing of torch, so that recipes can be read and refused without it; `flow.text` builds the
encoder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flowreel.errors import FlowreelError


class TextError(FlowreelError, ValueError):
    """A text encoder that cannot be built, or a text that it cannot take."""


@dataclass(frozen=True)
class TextSpec:
    """Which text encoder a model reads: all that is needed to build it again.

    Attributes:
        kind: "hashed" or "t5".
        length: number of text tokens, padded or cut to it.
        dim: width of a text token.
        path: id or folder of the T5 weights (kind "t5" only).
    """

    kind: str = "hashed"
    length: int = 16
    dim: int = 64
    path: str | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic where a recipe holds this

    def __post_init__(self) -> None:
        if self.kind not in ("hashed", "t5"):
            raise TextError(f"text.kind is {self.kind!r}; allowed: 'hashed', 't5'")
        if self.length < 1 or self.dim < 1:
            raise TextError(f"text.length {self.length} and text.dim {self.dim} must be at least 1")
        if self.kind == "t5" and not self.path:
            raise TextError(
                "text.kind 't5' needs text.path, such as 'google/flan-t5-xl' or a folder"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
