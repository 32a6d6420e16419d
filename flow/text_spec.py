"""Which text encoder a model reads, in plain values.

Knows nothing of torch, so that recipes can be read and refused without it; `flow.text` builds the
encoder.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowreel.errors import FlowreelError
from flowreel.values import sha256_of


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


HASHED_WEIGHTS = "words-1"
"""Stands for the weights of `hashed`, which has none; it changes if its vectors ever do."""


def weights_digest(spec: TextSpec) -> str:
    """What tells an encoder's weights from others: 16 hex digits of their SHA-256.

    All files of a folder of weights are read, tokenizer and configuration too. Of an id of a hub it
    is the copy on this machine; nothing is fetched.

    Returns:
        The digest; empty where the weights are not on this machine.
    """
    if spec.kind == "hashed":
        return HASHED_WEIGHTS
    folder = _weights_folder(spec)
    if folder is None:
        return ""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    # Beside safetensors, the older form of the same weights is not read by anybody.
    weights = ".safetensors" if any(p.suffix == ".safetensors" for p in paths) else ".bin"
    paths = [path for path in paths if path.suffix in (".json", ".model", ".txt", weights)]
    return _digest_of_files(tuple(paths), tuple(path.stat().st_mtime_ns for path in paths))


@lru_cache(maxsize=8)
def _digest_of_files(paths: tuple[Path, ...], _times_ns: tuple[int, ...]) -> str:
    """Of names and contents; gigabytes are read once by a process, while their times stay."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]


def _weights_folder(spec: TextSpec) -> Path | None:
    assert spec.path is not None
    if Path(spec.path).is_dir():
        return Path(spec.path)
    # Here, because recipes are read without it.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(spec.path, "config.json")
    except HFValidationError:
        # A path of a folder that is not on this machine.
        return None
    return Path(config).parent if isinstance(config, str) else None
