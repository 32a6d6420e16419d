"""Workers that agree through their hosts, beside the traffic of training.

Made on all workers in the same order. A group of its own lets a thread agree with the threads of
other workers while training goes on, and never waits for a device. Knows nothing of what is agreed
on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

from training.parallel import COLLECTIVE_TIMEOUT_S, Parallel

_T = TypeVar("_T")


@dataclass(frozen=True)
class HostGroup:
    """All workers of a run, as one thread of each sees them.

    Attributes:
        rank, world: number of this worker, and of all.
        handle: of the collectives (gloo); None in a single process.

    >>> alone = HostGroup(rank=0, world=1, handle=None)
    >>> alone.of_first("a"), alone.of_all("a")
    ('a', ['a'])
    """

    rank: int
    world: int
    handle: dist.ProcessGroup | None

    @classmethod
    def of(cls, parallel: Parallel) -> HostGroup:
        """A new group of all workers; all of them call this."""
        handle = None
        if parallel.mesh is not None:
            handle = dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
        return cls(parallel.rank, parallel.world, handle)

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that writes what is written once."""
        return self.rank == 0

    def of_first(self, value: _T) -> _T:
        """Worker 0's value, for all: plain values."""
        if self.handle is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.handle)
        return values[0]

    def of_all(self, value: _T) -> list[_T]:
        """Every worker's value, by rank, for all: plain values."""
        if self.handle is None:
            return [value]
        values: list[_T] = [value] * self.world
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def together(self, action: Callable[[], _T]) -> _T:
        """Do something on every worker, and go on when all have; gives this worker's result.

        Raises:
            OSError: on all workers, where the disk failed one of them: that one's error.
        """
        result, error = None, None
        try:
            result = action()
        except OSError as failure:
            error = failure
        for failed in self.of_all(error):
            if failed is not None:
                raise failed
        return cast(_T, result)
