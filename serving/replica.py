"""A replica's one compute thread, and the credit of a session. Knows nothing of Ray, HTTP or models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
