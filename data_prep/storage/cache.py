"""A store's large file on this machine's disk, so that all its processes map one copy.

    ~/.cache/flowreel/WHERE-VERSION.NAME    WHERE: digest of the folder; VERSION: of size and etag

A copy is written whole, and its size is looked at before it is used. One process downloads while
the others wait for it. A newer version takes the place of older ones; whoever has those mapped
keeps them. Knows nothing of what the file holds.
"""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.storage.folder import Folder, LocalFolder
from data_prep.storage.location import StorageError, failing
from flowreel.files import replacing
from flowreel.values import digest_of

_PART_BYTES = 1 << 26
"""Bytes of one request of a download."""
_DOWNLOAD_S = 3600.0
"""How long a process waits for another one's download, in seconds."""


def cache_folder() -> Path:
    """Where copies lie: `$XDG_CACHE_HOME/flowreel`, by default `~/.cache/flowreel`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base or Path.home() / ".cache", "flowreel")


def local_copy(folder: Folder, name: str) -> Path | None:
    """A path on this machine with the content of a folder's file; None where there is no such file.

    A local folder's file is its own copy.

    >>> import tempfile
    >>> folder = LocalFolder(tempfile.mkdtemp())
    >>> folder.write("a.txt", b"whole")
    >>> local_copy(folder, "a.txt").read_bytes(), local_copy(folder, "b.txt")
    (b'whole', None)

    Raises:
        StorageError: the store or this machine's disk fails.
    """
    if isinstance(folder, LocalFolder):
        return Path(folder.location, name) if folder.exists(name) else None
    version = folder.version(name)
    if not version:
        return None
    size_bytes = int(version.split()[0].removeprefix("size:"))
    where = digest_of([folder.location, name])
    path = cache_folder() / f"{where}-{digest_of(version)}.{name.replace('/', '_')}"
    if _is_whole(path, size_bytes):
        return path
    with LocalFolder(path.parent).lock(f".{where}.lock", wait_s=_DOWNLOAD_S):
        if not _is_whole(path, size_bytes):
            _download(folder, name, path, size_bytes)
            for other in path.parent.glob(f"{where}-*"):
                if other != path:
                    other.unlink(missing_ok=True)
    return path


def _is_whole(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _download(folder: Folder, name: str, path: Path, size_bytes: int) -> None:
    with failing("write", path), replacing(path) as partial:
        with partial.open("wb") as target, folder.failing("read", name):
            with folder.open(name) as source:
                for start in range(0, size_bytes, _PART_BYTES):
                    target.write(source.read_at(_PART_BYTES, start))
            written = target.tell()
        if written != size_bytes:
            raise StorageError(
                f"{folder.where(name)} changed while it was read ({written} bytes came of "
                f"{size_bytes}); run the same command again"
            )
