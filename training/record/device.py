"""What a device says of a step: how long it took there, and how much memory is held.

A GPU runs behind the process that drives it, so a step's time is taken by events on its own time
line, and read at a report, when the process waits for the device anyway. Knows nothing of what a
step computes.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

Mark = float | torch.cuda.Event
"""A moment on a device's time line."""
_STATM = Path("/proc/self/statm")


class StepClock:
    """Marks moments of a device's work, and tells the seconds between two of them.

    On a CPU the moment is now; on a GPU it is when all work that was asked for so far is done.

    >>> clock = StepClock(torch.device("cpu"))
    >>> start, end = clock.mark(), clock.mark()
    >>> 0 <= clock.seconds(start, end) < 60
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        """The moment that the work so far is done; does not wait for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds from one mark to a later one; waits until the device is there."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        assert isinstance(start, float), "both marks are of one clock"
        assert isinstance(end, float), "both marks are of one clock"
        return end - start


@dataclass(frozen=True)
class StepTime:
    """When a step was on its device.

    Attributes:
        start, end: marks around the step and the wait for its batch.
        data_wait_s: seconds that the process waited for the batch.
        time_s: when the step was asked for, in seconds since 1970.
    """

    start: Mark
    end: Mark
    data_wait_s: float
    time_s: float


def memory_of(device: torch.device) -> dict[str, int]:
    """Memory of this process: `rss_bytes` now, and on a GPU `device_peak_bytes` since its start.

    >>> memory_of(torch.device("cpu"))["rss_bytes"] > 1 << 20
    True
    """
    memory = {"rss_bytes": _resident_bytes()}
    if device.type == "cuda":
        memory["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return memory


def _resident_bytes() -> int:
    if _STATM.is_file():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    # Elsewhere only the peak is known without a package: in bytes on macOS, in KiB on BSD.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
