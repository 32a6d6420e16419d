"""The parts of the service on Ray that need no cluster: a replica's one compute thread, the credit
of a session, and what the machine is asked about ports and processes.

Knows nothing of Ray, HTTP or models.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch

T = TypeVar("T")


class ComputeThread:
    """One thread that does all the tensor work of a process, so that its event loop always answers.

    Sessions take turns on it, a frame at a time, in order of asking.
    """

    def __init__(self, torch_threads: int) -> None:
        torch.set_num_threads(torch_threads)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


@dataclass
class Credit:
    """How many frames of a session may have been made; raised by whoever takes them."""

    allowed: int
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def raise_to(self, allowed: int) -> None:
        """Never lowers, so grants may come late, twice or out of order."""
        self.allowed = max(self.allowed, allowed)
        self._changed.set()

    async def wait_for(self, index: int) -> None:
        """Until frame `index` may be made."""
        while index >= self.allowed:
            self._changed.clear()
            await self._changed.wait()


class ServeStartError(RuntimeError):
    """The service could not be started or stopped; the message says why."""


def bindable_port(host: str, port: int) -> int:
    """The port, or a free one for 0; ServeStartError where nothing can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeStartError(
                f"cannot listen on {host}:{port} ({error.strerror}); "
                "choose another port, or 0 for a free one"
            ) from error
        return int(probe.getsockname()[1])


def process_runs(pid: int) -> bool:
    """Whether a process with this id is on this machine."""
    return Path(f"/proc/{pid}").exists()


def wait_ready(url: str, timeout_s: float) -> dict[str, int]:
    """Process ids by stage, once `/health` says ready; ServeStartError where it never does."""
    give_up_s = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < give_up_s:
        try:
            answer = httpx.get(f"{url}/health", timeout=10)
            if answer.status_code == 200:
                return dict(answer.json()["pids"])
            last = f"{answer.status_code} {answer.text[:300]}"
        except httpx.TransportError as error:
            last = type(error).__name__
        time.sleep(0.1)
    raise ServeStartError(
        f"{url}/health was not ready within {timeout_s:g} s; the last answer: {last}"
    )
