"""A lock in an object store, where there is neither `flock` nor a process table.

Whoever wants the lock `NAME` puts a file of its own, `NAME/ID.json`, and then lists `NAME/`. It
has the lock where it sees no other file. Stores list what was put before (S3 since 2020), so of two
who come at once at least one sees the other, steps back and tries again. A holder writes its file
anew every few seconds; a file that has not changed for `LEASE_S` by the watcher's own clock, or whose
process is seen to be gone on this very machine, is removed. A holder that could not renew for so
long knows by its own clock that it lost the lock. Clocks of different machines are never compared.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.storage.folder import Folder, LockHeld
from data_prep.storage.location import StorageError

log = logging.getLogger("flowreel.prepare")

LEASE_S = 30.0
"""A lease that was not renewed for so long has ended, in seconds."""
BEAT_S = 5.0
"""How often it is renewed, in seconds."""
_SAFE_S = LEASE_S - 2 * BEAT_S
_let_go: set[str] = set()
"""Leases of this process that it could not remove, as the store failed."""


def _now_s() -> float:
    """Seconds on a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    """What has one process table: host, boot and, in containers, process namespace; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started, in clock ticks; empty where it is dead or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_gone(base: str, holder: dict[str, str]) -> bool:
    """Whether the holder let go, or is a process of this machine that is seen to have ended."""
    here = _machine()
    if base in _let_go:
        return True
    if not here or holder.get("machine") != here:
        return False
    return _started(int(holder["pid"])) != holder["started"]


class _Lease:
    """One attempt at a lock, and once it is held, its renewal."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder = folder
        self.name = name
        self.base = f"{uuid.uuid4().hex}.json"
        self.beat = 0
        self._renewed_s = _now_s()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def put(self) -> None:
        begun_s = _now_s()
        self.beat += 1
        pid = os.getpid()
        holder = {"host": socket.gethostname(), "machine": _machine(), "pid": str(pid)}
        # Of one length always: a reader may ask for the size before, and the content after, a renewal.
        holder |= {"started": _started(pid), "beat": f"{self.beat:010d}"}
        self.folder.write(f"{self.name}/{self.base}", json.dumps(holder).encode())
        self._renewed_s = begun_s

    def others(self) -> dict[str, bytes]:
        """The files of all others, by base name."""
        found = {}
        for base in self.folder.names(self.name):
            if base != self.base:
                try:
                    found[base] = self.folder.read(f"{self.name}/{base}")
                except FileNotFoundError:  # let go of between the two calls
                    continue
                except StorageError:
                    # Arrow asks for the size first; what goes away after that is no plain 404.
                    if self.folder.exists(f"{self.name}/{base}"):
                        raise
        return found

    def remove(self) -> None:
        self.folder.remove(f"{self.name}/{self.base}")

    def hold(self) -> None:
        self._thread.start()

    def check(self) -> None:
        """Raises LockHeld where the lease may have ended."""
        if _now_s() - self._renewed_s > _SAFE_S or self._ended.is_set():
            raise LockHeld(self.folder.where(self.name))

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                if _now_s() - self._renewed_s > _SAFE_S or not self.folder.exists(
                    f"{self.name}/{self.base}"
                ):
                    self._ended.set()
                    return
                self.put()
            except StorageError:
                # The store may answer again in time; where it does not, `check` finds it late.
                continue

    def let_go(self) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.remove()
        except StorageError as error:
            # What went wrong before matters more; to others the lease ends by itself.
            log.warning("%s", error)
            _let_go.add(self.base)


@contextmanager
def hold_lease(folder: Folder, name: str, *, wait_s: float = 0.0) -> Iterator[Callable[[], None]]:
    """Hold the lock `name` of a store's folder; gives a function that raises once it is lost.

    A holder that is alive is told from one that died without a word by watching it: that takes up
    to `BEAT_S` and `LEASE_S`, whatever `wait_s` is.

    Args:
        folder: where the lock is.
        name: of the lock.
        wait_s: how long to wait for a living holder, in seconds.

    Raises:
        LockHeld: somebody alive holds it.
        StorageError: the store fails.
    """
    lease = _take(folder, name, wait_s)
    try:
        yield lease.check
    finally:
        lease.let_go()


def _take(folder: Folder, name: str, wait_s: float) -> _Lease:
    lease = _Lease(folder, name)
    seen: dict[str, tuple[bytes, float]] = {}
    begun_s = _now_s()
    while True:
        lease.put()
        others = lease.others()
        if not others:
            lease.hold()
            return lease
        lease.remove()
        alive = False
        for base, content in others.items():
            holder = json.loads(content)
            before, since_s = seen.setdefault(base, (content, _now_s()))
            if _is_gone(base, holder) or (before == content and _now_s() - since_s > LEASE_S):
                folder.remove(f"{name}/{base}")
                continue
            changed = before != content
            if changed:
                seen[base] = (content, _now_s())
            # Who came at the same moment steps back too: only a second beat is of a holder.
            here = holder["machine"] == _machine() != ""
            alive = alive or ((changed or here) and int(holder["beat"]) > 1)
        if alive and _now_s() - begun_s >= wait_s:
            raise LockHeld(folder.where(name))
        # By chance, so that two who came at once do not meet again.
        time.sleep(random.uniform(0.1, 0.5))
