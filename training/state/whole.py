"""Whether what lies in a checkpoint's folder is what was written there.

The marker names every file with its size and SHA-256, and ends in a digest of itself. Knows nothing
of what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from flowreel.files import write_json
from flowreel.values import sha256_of

MARKER_DIGEST = "marker_sha256"
_THREADS = 4
"""Files that are read at once: hashing lets other threads run."""


class FileDigest(NamedTuple):
    """A file as it was written."""

    size_bytes: int
    sha256: str


class Damaged(Exception):
    """A file is not what was written; the message names it and says what is wrong with it."""


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Size and SHA-256 of these files, as they lie there now."""
    ordered = sorted(names)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "digests") as pool:
        found = pool.map(lambda name: _digest_of(folder / name), ordered)
        return dict(zip(ordered, found, strict=True))


def _digest_of(path: Path) -> FileDigest:
    return FileDigest(path.stat().st_size, sha256_of(path))


def damage_in(folder: Path, files: Mapping[str, FileDigest]) -> str | None:
    """What is wrong with the first file that is not as it was written; None where all are.

    Sizes are looked at first, for they cost nothing.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_bytes(b"whole")
    >>> files = digests_of(folder, ["a"])
    >>> damage_in(folder, files)
    >>> _ = (folder / "a").write_bytes(b"whOle")
    >>> damage_in(folder, files)
    'a is not what was written: its SHA-256 is another'
    """
    for name, written in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != written.size_bytes:
            return f"{name} has {size} bytes, {written.size_bytes} were written"
    try:
        found = digests_of(folder, files)
    except OSError as error:
        return f"{shown_name(error, folder)} cannot be read ({error.strerror or error})"
    for name, digest in found.items():
        if digest.sha256 != files[name].sha256:
            return f"{name} is not what was written: its SHA-256 is another"
    return None


def shown_name(error: OSError, folder: Path) -> str:
    """The file that an error is about, as it is called in the folder."""
    return os.path.relpath(error.filename, folder) if error.filename else "a file"


def write_marker(path: Path, values: Mapping[str, Any]) -> None:
    """Write a marker with its own digest, whole or not at all."""
    write_json(path, {**values, MARKER_DIGEST: _own_digest(values)})


def read_marker(path: Path) -> dict[str, Any]:
    """A marker's values; one of format 2 or before has no digest and is believed.

    Raises:
        Damaged: it is cut, or not what was written.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path.name} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise Damaged(f"{path.name} holds no map")
    digest = values.pop(MARKER_DIGEST, None)
    has_none = digest is None and values.get("format") in (1, 2)
    if not has_none and digest != _own_digest(values):
        raise Damaged(f"{path.name} is not what was written: its digest is another")
    return values


def _own_digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
