"""Doing a thing beside others of its kind, or alone on this machine, across processes.

Two lock files: `work` is shared by those who work beside others and held by who is alone; `gate` is
passed by everybody on the way in and kept by who waits to be alone, so that newcomers cannot starve
it. The kernel lets go of both when a process dies. Knows nothing of what is done.
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

_STEPS_S = (0.0005, 0.02)
"""First and longest wait between tries: the gate is mostly held for microseconds."""


class Alone:
    """The two locks. Every process that shares a folder shares them.

    Example:
        >>> alone = Alone(Path(tempfile.mkdtemp()))
        >>> with alone.beside_others():
        ...     pass
        >>> with alone.by_itself(patience_s=1.0) as is_alone:
        ...     is_alone
        True
    """

    def __init__(self, folder: Path | None = None) -> None:
        """By default a folder of this user's in the machine's temporary folder."""
        self.folder = folder or Path(tempfile.gettempdir()) / f"flowreel-{os.getuid()}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def beside_others(self, patience_s: float = 600.0) -> Iterator[None]:
        """Work that may overlap with others', but not with who is alone.

        Waits at most `patience_s`: a stopped process must not stop everybody.
        """
        with self._opened("gate") as gate, self._opened("work") as work:
            end = time.monotonic() + patience_s
            _lock(gate, fcntl.LOCK_EX, end)
            _lock(work, fcntl.LOCK_SH, end)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield

    @contextlib.contextmanager
    def by_itself(self, patience_s: float = 600.0) -> Iterator[bool]:
        """Work while nobody else does; False where others did not end within `patience_s`."""
        with self._opened("gate") as gate, self._opened("work") as work:
            end = time.monotonic() + patience_s
            passed = _lock(gate, fcntl.LOCK_EX, end)
            yield _lock(work, fcntl.LOCK_EX, end) and passed

    def _opened(self, name: str) -> IO[bytes]:
        # Closing a file lets go of its lock.
        return (self.folder / f"decode.{name}").open("ab")


def _lock(file: IO[bytes], kind: int, end: float) -> bool:
    """Take a lock before the monotonic time `end`; whether it was given."""
    step_s, longest_s = _STEPS_S
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(step_s)
            step_s = min(2 * step_s, longest_s)
