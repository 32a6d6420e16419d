"""The device: which one, its clock, its peak of memory, and what is known of the machine.

Knows torch. Knows nothing of flows or of what is measured.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HOST_THREADS = 4
"""Threads of what is computed on the CPU beside a GPU: small models only."""


def device_for(rehearsal: bool) -> torch.device | None:
    """The CPU for a rehearsal, else the first CUDA device; None where there is none."""
    # Small products gain nothing from many threads, and on a busy machine threads wait for another.
    torch.set_num_threads(1 if rehearsal else HOST_THREADS)
    if rehearsal:
        return torch.device("cpu")
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has carried out all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, least and most of several samples."""

    median: float
    least: float
    most: float

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return 1e3 * self.median


def time_calls(
    run: Callable[[], object],
    device: torch.device,
    *,
    samples: int,
    calls: int = 1,
    warm_up: int = 2,
) -> Times:
    """Time of one call by the device's own clock.

    A sample is `calls` calls given to the device one after another, without a wait between them: so
    it is the time of the device, or of the host where the host is slower at giving. Waits for the
    device are only around a sample.
    """
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(samples):
        synchronize(device)
        seconds.append(_sample(run, device, calls) / calls)
    return Times(statistics.median(seconds), min(seconds), max(seconds))


def _sample(run: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call from start to end, by the host's clock: for calls of some length."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def free() -> None:
    """Give back the memory of what nobody holds any more, and forget the peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float | None:
    """Most gigabytes (1e9 bytes) that tensors took at once since `free`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def memory_gb(device: torch.device) -> float:
    """Gigabytes (1e9 bytes) of the device's memory; on a CPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures: device, versions, and settings of precision."""
    facts: dict[str, Any] = {
        "device": platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(),
        "memory_gb": round(memory_gb(device), 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "fp32_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    return facts


def _driver() -> str:
    """The driver's version, as `nvidia-smi` tells it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown: there is no nvidia-smi"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return answer.stdout.strip().partition("\n")[0]
