"""What a process and all its children cost, seen from outside: CPU time by title, and memory.

Reads /proc, so it runs on Linux only. Knows nothing of what the processes do.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_SAMPLE_S = 1.0
OTHERS = "(other programs)"


class Watch:
    """CPU time and memory of a process and all its children, looked at about once a second."""

    def __init__(self, pid: int, *, memory: bool) -> None:
        self.peak_bytes = 0
        # Adding up a process's pages takes the kernel ten milliseconds: not while time is measured.
        self._memory = memory
        self._pid = pid
        self._marks: list[dict[int, tuple[str, float]]] = []
        self._machine: list[tuple[float, float]] = []
        self._last: dict[int, tuple[str, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            pids = family(self._pid)
            if self._memory:
                self.peak_bytes = max(self.peak_bytes, sum(map(pss_bytes, pids)))
            self._last.update(_cpu(pids))

    def mark(self) -> None:
        """Remember the CPU times now: the first mark begins what is counted, the second ends it."""
        self._machine.append(machine_seconds())
        self._marks.append({**self._last, **_cpu(family(self._pid))})

    def stop(self) -> None:
        """Look no longer."""
        self._stopped.set()
        self._thread.join()

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds by title between the two marks."""
        if len(self._marks) < 2:
            return {}
        before, after = self._marks[:2]
        used: dict[str, float] = {}
        for pid, (title, seconds) in after.items():
            used[title] = used.get(title, 0.0) + seconds - before.get(pid, ("", 0.0))[1]
        (busy_0, idle_0), (busy_1, idle_1) = self._machine[:2]
        ordered = dict(sorted(used.items(), key=lambda item: -item[1]))
        others = max(0.0, busy_1 - busy_0 - sum(used.values()))
        return {**ordered, OTHERS: others, "(idle)": idle_1 - idle_0}


def family(pid: int) -> list[int]:
    """A process and all its descendants (Linux)."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            parents.setdefault(int(fields[1]), []).append(int(entry))
    pids = [pid]
    for parent in pids:
        pids += parents.get(parent, [])
    return pids


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu(pids: list[int]) -> dict[int, tuple[str, float]]:
    """(title, CPU seconds) of the processes that are there."""
    used = {}
    for pid in pids:
        fields = _stat(pid)
        if fields:
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            title = _title(pid)
            # A process that has just ended still has times, but no command line any more.
            if title:
                used[pid] = (title, seconds)
    return used


def machine_seconds() -> tuple[float, float]:
    """CPU seconds that the whole machine was busy, and idle, since it was started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]
    ticks = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - idle) / ticks, idle / ticks


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its descendants so far."""
    return sum(seconds for _, seconds in _cpu(family(pid)).values())


def _title(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().split()
    except OSError:
        return ""
    text = " ".join(words)
    if not text:
        return ""
    if "MapBatches(" in text:
        return text.partition("MapBatches(")[2].partition(")")[0]
    if "SinkActor" in text:
        return "SinkActor"
    if "read_child" in text:
        return "Decode: child"
    if "benchmarks.on_ray" in text:
        return "driver"
    return "Ray's own"


def pss_bytes(pid: int) -> int:
    """Proportional set size: a shared page is divided among the processes that share it."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0
