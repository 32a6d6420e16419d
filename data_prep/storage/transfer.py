"""A file of one folder as a file of another, by the cheapest way that there is.

    on one disk              a hard link: files are replaced and never changed in place
    inside one store         copied by the store itself, nothing comes through this machine
    anything else            streamed through this machine, and its SHA-256 looked at

Knows nothing of what the file holds.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from data_prep.storage.folder import Folder, LocalFolder
from data_prep.storage.location import StorageError
from data_prep.storage.store import StoreFolder
from flowreel.files import replacing

Way = Literal["linked", "copied", "streamed"]
WAYS: tuple[Way, ...] = ("linked", "copied", "streamed")

_PART_BYTES = 1 << 24
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""The file systems differ, or this one has no hard links."""


def transfer(source: Folder, name: str, target: Folder, target_name: str, sha256: str = "") -> Way:
    """Make a file of `target` of one of `source`, whole or not at all; returns how.

    >>> import tempfile
    >>> a, b = LocalFolder(tempfile.mkdtemp()), LocalFolder(tempfile.mkdtemp())
    >>> a.write("x/1.txt", b"whole")
    >>> transfer(a, "x/1.txt", b, "x/2.txt"), b.read("x/2.txt")
    ('linked', b'whole')

    Args:
        source, name: the file that is there.
        target, target_name: the file that is to be there; one in its place is replaced.
        sha256: of its content, as hex digits; looked at where the content comes through here.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: a disk or store fails, or the content is not what it should be.
    """
    if isinstance(source, LocalFolder) and isinstance(target, LocalFolder):
        if _link(Path(source.location, name), target, target_name):
            return "linked"
    elif isinstance(target, StoreFolder) and target.copy_from(source, name, target_name):
        return "copied"
    _stream(source, name, target, target_name, sha256)
    return "streamed"


def _link(path: Path, target: LocalFolder, target_name: str) -> bool:
    """Link a file; False where that is not possible here."""
    with target.failing("write", target_name):
        try:
            with replacing(Path(target.location, target_name)) as partial:
                partial.unlink(missing_ok=True)
                os.link(path, partial)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
    return True


def _stream(source: Folder, name: str, target: Folder, target_name: str, sha256: str) -> None:
    digest = hashlib.sha256()
    with (
        source.failing("read", name),
        source.open(name) as stream,
        target.replacing(target_name) as partial,
        partial.open("wb") as file,
    ):
        while data := stream.read(_PART_BYTES):
            digest.update(data)
            file.write(data)
        if sha256 and digest.hexdigest() != sha256:
            raise StorageError(
                f"{source.where(name)} holds other bytes than its manifest says (SHA-256 "
                f"{digest.hexdigest()[:12]}…, not {sha256[:12]}…); delete its shard's manifest, "
                "prepare the shard again, then run the same command again"
            )


def counted(ways: list[Way]) -> dict[str, int]:
    """How many files went each way.

    >>> counted(["linked", "linked"])
    {'linked': 2, 'copied': 0, 'streamed': 0}
    """
    counts = Counter(ways)
    return {way: counts[way] for way in WAYS}
