"""A replica's one compute thread, and the credit of a session.

Knows nothing of Ray, HTTP or models.
"""

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

    >>> async def add() -> int:
    ...     return await ComputeThread(torch_threads=1)(sum, [1, 2, 3])
    >>> asyncio.run(add())
    6
    """

    def __init__(self, torch_threads: int) -> None:
        """Set how many threads torch uses for one operation, in the whole process."""
        torch.set_num_threads(torch_threads)
        # One worker: two operations at one time would only share the same cores, and each session
        # would wait twice as long for its frame.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    async def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """The result of `work(*args)`, computed on the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


@dataclass
class Credit:
    """How many frames of a session may be made by now; raised by the one who takes them.

    >>> credit = Credit(num_frames=2)
    >>> credit.raise_to(5)
    >>> credit.raise_to(4)
    >>> credit.num_frames
    5
    """

    num_frames: int
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def raise_to(self, num_frames: int) -> None:
        """Allow so many frames; it never lowers, so grants may come late, twice or out of order."""
        self.num_frames = max(self.num_frames, num_frames)
        self._changed.set()

    async def wait_for(self, index: int) -> None:
        """Return once frame `index` may be made."""
        while index >= self.num_frames:
            self._changed.clear()
            await self._changed.wait()
