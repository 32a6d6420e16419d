"""Plain values (what JSON holds): their digest, and nested maps made flat.

Standard library only; every package imports it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest_of(values: Any) -> str:
    """The first 16 hex digits of the SHA-256 of plain values, whatever the order of their keys.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, as hex digits; 16 MiB are held at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one, keys joined by dots.

    >>> flattened({"a": {"b": 1, "c": {"d": 2}}, "e": 3})
    {'a.b': 1, 'a.c.d': 2, 'e': 3}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat |= flattened(value, name) if isinstance(value, Mapping) else {name: value}
    return flat
