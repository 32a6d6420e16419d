"""A lock of this machine that many processes share, or that one holds while no other works.

Two lock files make it fair. `work` is held shared by those who work beside others, and exclusively
by one who works alone. `gate` is passed by everybody on the way in, and kept by one who waits to be
alone, so that newcomers cannot starve it. The kernel lets go of both files when a process dies.
Knows nothing of what is done under the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_PAUSES_S = (0.0005, 0.02)
"""First and longest pause between two tries: the gate is mostly held for microseconds."""


class MachineLock:
    """A lock that is held by many together (`shared`) or by one alone (`exclusive`).

    Every process that names the same folder shares it.

    >>> lock = MachineLock(Path(tempfile.mkdtemp()))
    >>> with lock.shared():
    ...     pass
    >>> with lock.exclusive(patience_s=1.0) as is_alone:
    ...     is_alone
    True
    """

    def __init__(self, folder: Path | None = None) -> None:
        """By default the lock files are in a folder of this user's, in the temporary folder."""
        self.folder = folder or Path(tempfile.gettempdir()) / f"flowreel-{os.getuid()}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def shared(self, patience_s: float = 600.0) -> Iterator[None]:
        """Work beside others that share the lock, but not beside one that holds it alone.

        Waits at most `patience_s` and then works anyway: a process that was stopped while it held
        the lock must not stop everybody.
        """
        with self._opened("gate") as gate, self._opened("work") as work:
            deadline = time.monotonic() + patience_s
            _lock(gate, fcntl.LOCK_EX, deadline)
            _lock(work, fcntl.LOCK_SH, deadline)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield

    @contextlib.contextmanager
    def exclusive(self, patience_s: float = 600.0) -> Iterator[bool]:
        """Work while no other does; gives False where others did not end within `patience_s`."""
        with self._opened("gate") as gate, self._opened("work") as work:
            deadline = time.monotonic() + patience_s
            passed = _lock(gate, fcntl.LOCK_EX, deadline)
            yield _lock(work, fcntl.LOCK_EX, deadline) and passed

    def _opened(self, name: str) -> IO[bytes]:
        # Closing the file lets go of its lock.
        return (self.folder / f"decode.{name}").open("ab")


def _lock(file: IO[bytes], kind: int, deadline: float) -> bool:
    """Take a lock before the monotonic time `deadline`; returns whether it was given."""
    pause_s, longest_s = _PAUSES_S
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)
