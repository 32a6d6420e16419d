"""Local files that are there whole or not at all, and stay after a power cut.

Knows nothing of what they hold, and nothing of object stores (`data_prep.storage`). Standard
library only; every package imports it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".tmp"
"""What an unfinished file's name ends in: `.NAME.PID.tmp`, beside the file that it becomes."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there on leaving in peace takes the place of `path`, whole.

    Folders on the way are made. On an exception `path` stays as it was.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a" / "note.txt"
    >>> with replacing(target) as partial:
    ...     _ = partial.write_text("whole")
    >>> target.read_text(), [p.name for p in target.parent.iterdir()]
    ('whole', ['note.txt'])
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, path)
    except OSError as error:
        # A full disk says nothing of the file; whoever reads the message wants to know which.
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file, whole or not at all; text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON with sorted keys, whole or not at all."""
    write_whole(path, json.dumps(values, indent=1, sort_keys=True) + "\n")


def sync_file(path: Path) -> None:
    """Wait until a file's content would outlive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's list of names would outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
