"""How far a long work is: what its `progress` argument is called with. Knows nothing of bars."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[int, int], None]
"""progress(count, total): how many of the samples or records are written, and how many in all."""

WINDOW_S = 60.0
"""Rate and bottleneck are those of so many seconds."""
LEAST_S = 1.0
"""Of fewer seconds nothing is said: samples of one block end at one moment."""


@dataclass(frozen=True)
class Busy:
    """What a stage has done so far."""

    workers: int
    spent_s: float
    """Seconds that its workers spent inside it, added up."""


@dataclass(frozen=True)
class RunState:
    """How far a run of `prepare` is."""

    shards: int
    """Finished, by this run or an earlier one."""
    of_shards: int
    samples: int = 0
    """Finished by this run."""
    by_status: Mapping[str, int] = field(default_factory=dict)
    """The same samples by status: kept, dropped, failed."""
    samples_left: int | None = None
    """About so many, judged by the shards that this run has finished; None before the first."""
    stages: Mapping[str, Busy] = field(default_factory=dict)
    """In order; empty before the first sample is finished."""


RunProgress = Callable[[RunState], None]
"""progress(state), called at the start and after every finished sample and shard."""


class Tally:
    """Counts what the receipts of a run say.

    >>> tally = Tally(shards=0, of_shards=3)
    >>> kept = {"shard": "a", "number": 0, "status": "kept", "reused": False, "committed": False}
    >>> for receipt in (kept, {**kept, "number": 1}, {**kept, "number": -1, "committed": True}):
    ...     tally.take(receipt)
    >>> state = tally.state({})
    >>> state.shards, state.samples, state.samples_left
    (1, 2, 4)
    """

    def __init__(self, shards: int, of_shards: int) -> None:
        self.shards = shards
        self.of_shards = of_shards
        self.by_status: Counter[str] = Counter()
        self.reused = 0
        self._finished = Counter[str]()
        self._in_flight = Counter[str]()

    def take(self, receipt: Mapping[str, Any]) -> None:
        """Count one receipt of the sink."""
        shard = receipt["shard"]
        if receipt["number"] >= 0:
            self.by_status[receipt["status"] or "kept"] += 1
            self.reused += receipt["reused"]
            self._in_flight[shard] += 1
        if receipt["committed"]:
            self.shards += 1
            self._finished[shard] = self._in_flight.pop(shard, 0)

    @property
    def samples(self) -> int:
        """Samples that were counted."""
        return self.by_status.total()

    def state(self, stages: Mapping[str, Busy]) -> RunState:
        """How far the run is now."""
        left = None
        if self._finished:
            mean = self._finished.total() / len(self._finished)
            unfinished = mean * (self.of_shards - self.shards)
            left = max(0, round(unfinished) - self._in_flight.total())
        return RunState(
            shards=self.shards,
            of_shards=self.of_shards,
            samples=self.samples,
            by_status=dict(self.by_status),
            samples_left=left,
            stages=dict(stages),
        )


class Pace:
    """Rate, time left and bottleneck of a run, over the last minute of it.

    >>> clock = iter([0.0, 10.0, 20.0]).__next__
    >>> pace = Pace(clock)
    >>> for samples in (1, 21, 41):
    ...     busy = {"decode": Busy(2, samples / 4), "encode": Busy(1, samples * 0.45)}
    ...     pace.take(RunState(1, 3, samples, {}, samples_left=80, stages=busy))
    >>> pace.samples_per_s, pace.left_s, pace.bottleneck
    (2.0, 40.0, ('encode', 0.9))
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._points: deque[tuple[float, RunState]] = deque()

    def take(self, state: RunState) -> None:
        """Note a state. The start-up, before the first sample, counts for nothing."""
        if not state.samples:
            return
        now = self._clock()
        # The last point is moved on until it is a second from the one before.
        if len(self._points) > 1 and self._points[-1][0] - self._points[-2][0] < 1.0:
            self._points.pop()
        self._points.append((now, state))
        while len(self._points) > 2 and now - self._points[1][0] >= WINDOW_S:
            self._points.popleft()

    @property
    def samples_per_s(self) -> float | None:
        """Samples finished per second; None while that is not known."""
        elapsed_s, first, last = self._span()
        return (last.samples - first.samples) / elapsed_s if elapsed_s >= LEAST_S else None

    @property
    def left_s(self) -> float | None:
        """About so many seconds are left; None while that is not known."""
        rate, left = self.samples_per_s, self._span()[2].samples_left
        return left / rate if rate and left is not None else None

    @property
    def bottleneck(self) -> tuple[str, float] | None:
        """The busiest stage, and the share of the time that its workers were busy, 0..1."""
        elapsed_s, first, last = self._span()
        shares = {
            name: min(1.0, (now.spent_s - first.stages[name].spent_s) / (elapsed_s * now.workers))
            for name, now in last.stages.items()
            if name in first.stages and elapsed_s >= LEAST_S and now.workers
        }
        return max(shares.items(), key=lambda item: item[1]) if shares else None

    def _span(self) -> tuple[float, RunState, RunState]:
        """Seconds between the oldest and the newest point, and the two."""
        if not self._points:
            nothing = RunState(0, 0)
            return 0.0, nothing, nothing
        (begin_s, first), (end_s, last) = self._points[0], self._points[-1]
        return end_s - begin_s, first, last
