"""A lock in an object store, where there is neither `flock` nor a process table.

Whoever wants the lock `NAME` puts a file of its own, `NAME/ID.json`, and then lists `NAME/`. It
has the lock if it sees no other file but those of its own group. Stores list what was put before
(S3 since 2020), so of two who come at once at least one sees the other, steps back and tries again.

A holder writes its file anew every few seconds. A watcher removes a file that has not changed for
`LEASE_S` by the watcher's own clock, or whose process has ended on this very machine. A holder
that could not renew its file for so long knows by its own clock that it lost the lock. Clocks of
different machines are never compared. Knows nothing of what the lock protects.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.storage.folder import Folder
from data_prep.storage.location import StorageError
from flowreel.locks import LockHeld

log = logging.getLogger("flowreel.prepare")

LEASE_S = 30.0
"""A lease that was not renewed for so many seconds has ended."""
BEAT_S = 5.0
"""A lease is renewed every so many seconds."""
_SAFE_S = LEASE_S - 2 * BEAT_S
"""A holder trusts its lease for so long after a renewal: earlier than any watcher gives it up."""
_abandoned: set[str] = set()
"""Base names of leases of this process that it could not remove, because the store failed."""


def _now_s() -> float:
    """Seconds on a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    """What has one process table: host, boot and process namespace; empty where it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started, in clock ticks; empty if it is dead or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class _Holder:
    """What a lease's file says of its holder."""

    host: str
    machine: str
    """See `_machine`."""
    pid: str
    started: str
    """See `_started`: another process may have the same number later."""
    beat: str
    """How often the file was written, as ten digits."""
    group: str = ""
    """Holders of one group hold the lock together; empty: alone."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> _Holder:
        return cls(**json.loads(data))

    @property
    def is_on_this_machine(self) -> bool:
        machine = _machine()
        return machine != "" and self.machine == machine

    @property
    def has_ended(self) -> bool:
        """Whether it is a process of this machine that is not there any more."""
        return self.is_on_this_machine and _started(int(self.pid)) != self.started


class _Lease:
    """One attempt at a lock and, once the lock is held, its renewal."""

    def __init__(self, folder: Folder, name: str, group: str) -> None:
        self.folder = folder
        self.name = name
        self.group = group
        self.base = f"{uuid.uuid4().hex}.json"
        self.beat = 0
        self._renewed_s = _now_s()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def put(self) -> None:
        """Write the lease's file, or write it anew."""
        begun_s = _now_s()
        self.beat += 1
        pid = os.getpid()
        # The file has one length always: a reader may see the size of one renewal and the content
        # of the next.
        holder = _Holder(
            host=socket.gethostname(),
            machine=_machine(),
            pid=str(pid),
            started=_started(pid),
            beat=f"{self.beat:010d}",
            group=self.group,
        )
        self.folder.write(f"{self.name}/{self.base}", holder.to_json())
        self._renewed_s = begun_s

    def others(self) -> dict[str, bytes]:
        """The files of all others that are not of this group, by base name."""
        contents = {}
        for base in self.folder.names(self.name):
            if base != self.base:
                try:
                    content = self.folder.read(f"{self.name}/{base}")
                    if not self.group or _Holder.from_json(content).group != self.group:
                        contents[base] = content
                except FileNotFoundError:  # its holder let go of it between the two calls
                    continue
                except StorageError:
                    # Arrow asks for the size first; what goes away after that is no plain 404.
                    if self.folder.exists(f"{self.name}/{base}"):
                        raise
        return contents

    def remove(self) -> None:
        """Take the file away."""
        self.folder.remove(f"{self.name}/{self.base}")

    def hold(self) -> None:
        """Begin to renew the file every few seconds."""
        self._thread.start()

    def check(self) -> None:
        """Raise LockHeld where the lease may have ended."""
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
                # The store may answer again in time; if it does not, `check` sees that it is late.
                continue

    def let_go(self) -> None:
        """End the renewal and take the file away."""
        self._ended.set()
        self._thread.join()
        try:
            self.remove()
        except StorageError as error:
            # What went wrong before matters more than this; for others the lease ends by itself.
            log.warning("%s", error)
            _abandoned.add(self.base)


@contextmanager
def hold_lease(
    folder: Folder, name: str, *, wait_s: float = 0.0, group: str = ""
) -> Iterator[Callable[[], None]]:
    """Hold the lock `name` of a store's folder.

    Entering gives a function that raises LockHeld once the lock is lost. A holder that died without
    a word looks like a living one until it has been watched for a while: up to `LEASE_S`, whatever
    `wait_s` is.

    >>> import tempfile
    >>> from data_prep.storage.folder import LocalFolder
    >>> folder = LocalFolder(tempfile.mkdtemp())
    >>> with hold_lease(folder, "lock") as check:
    ...     check()
    ...     len(folder.names("lock"))
    1
    >>> folder.names("lock")
    []

    Args:
        folder: the folder that the lock is in.
        name: name of the lock.
        wait_s: how long to wait for a living holder, in seconds.
        group: holders of one group hold it together; empty: alone.

    Raises:
        LockHeld: somebody alive holds it.
        StorageError: the store fails.
    """
    lease = _take(folder, name, wait_s, group)
    try:
        yield lease.check
    finally:
        lease.let_go()


def _take(folder: Folder, name: str, wait_s: float, group: str) -> _Lease:
    """Put a file, look for others, step back and try again, until there are no others."""
    lease = _Lease(folder, name, group)
    first_seen: dict[str, tuple[bytes, float]] = {}
    begun_s = _now_s()
    while True:
        lease.put()
        others = lease.others()
        if not others:
            lease.hold()
            return lease
        lease.remove()
        is_alive = False
        for base, content in others.items():
            holder = _Holder.from_json(content)
            before, since_s = first_seen.setdefault(base, (content, _now_s()))
            has_changed = before != content
            is_stale = not has_changed and _now_s() - since_s > LEASE_S
            if base in _abandoned or holder.has_ended or is_stale:
                folder.remove(f"{name}/{base}")
                continue
            if has_changed:
                first_seen[base] = (content, _now_s())
            # One who came at the same moment writes once and steps back: only a file that was
            # written a second time is a holder's.
            is_renewed = int(holder.beat) > 1
            is_alive = is_alive or (is_renewed and (has_changed or holder.is_on_this_machine))
        if is_alive and _now_s() - begun_s >= wait_s:
            raise LockHeld(folder.where(name))
        # The pause is random, so that two who came at once do not meet again.
        time.sleep(random.uniform(0.1, 0.5))
