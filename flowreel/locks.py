"""Locks of files on this machine, or on a file system that machines share: never stale.

The kernel lets go of a lock when the process that holds it dies. Knows nothing of what is locked,
and nothing of object stores (`data_prep.storage`). Standard library only; every package imports it.

    LockHeld(RuntimeError)   somebody else holds the lock; the caller says of what, and what to do
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PAUSE_S = 0.05


class LockHeld(RuntimeError):
    """Somebody else holds the lock."""


@contextmanager
def file_lock(path: Path, *, wait_s: float = 0.0, group: str = "") -> Iterator[IO[str]]:
    """Hold a file against every other process, or against every other group; gives it, open.

    The folder must be there. A group holds the lock shared, and its name is the content of the
    file; a lock that is held alone leaves the content to its holder.

    Args:
        path: the lock's file; made where there is none, and never removed.
        wait_s: how long to wait for another holder, in seconds.
        group: processes that name the same group hold the lock together; empty: alone.

    Raises:
        LockHeld: somebody else holds it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / ".lock"
    >>> with file_lock(path), file_lock(path):
    ...     pass
    Traceback (most recent call last):
    ...
    flowreel.locks.LockHeld: ...
    """
    deadline = time.monotonic() + wait_s
    with path.open("a+") as file:
        while not _flocked(file.fileno(), group):
            if time.monotonic() >= deadline:
                raise LockHeld(os.fspath(path))
            time.sleep(_PAUSE_S)
        yield file


def _flocked(descriptor: int, group: str) -> bool:
    """Try to take an flock, alone or with a group; whether it is held."""
    is_first = _try_flock(descriptor, fcntl.LOCK_EX)
    if not group:
        return is_first
    if is_first:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, group.encode())
    # The kernel does not turn one lock into the other at one stroke: another group may come
    # between, so that what the file says is read again once the shared lock is held.
    if not _try_flock(descriptor, fcntl.LOCK_SH):
        return False
    if os.pread(descriptor, len(group) + 1, 0) == group.encode():
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _try_flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
