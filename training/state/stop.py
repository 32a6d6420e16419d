"""When a run saves and leaves before its end, because somebody asked it to.

A driver notes signals; it tells workers of other processes by a file in the run's folder. What any
worker was told, all learn at the same step, so that all save alike. Knows nothing of what is saved,
and nothing of Ray.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from flowreel.errors import Terminated
from training.state.group import HostGroup

STOP_NAME = "stop-request"
"""A file in the run's folder: whoever makes it asks the workers to save and leave."""


class Notice(IntEnum):
    """What a run is asked for; of two, the greater holds."""

    NONE = 0
    SAVE = 1
    """Save now and go on: this machine may soon be taken away."""
    STOP = 2
    """Save and leave."""


Ask = Callable[[], Notice]
"""Says what this worker was told so far; called once a step, alike on all workers."""


def nothing() -> Notice:
    """What a worker was told whom nobody tells anything."""
    return Notice.NONE


class Vote:
    """What any worker was told, known to all workers at the same step.

    A vote is counted while the next step is computed, by the hosts alone, so that no step waits for
    it: with several workers a notice is known one step late.

    Args:
        group: all workers.
        ask: what this one was told.

    >>> vote = Vote(HostGroup(0, 1, None), lambda: Notice.SAVE)
    >>> [vote.at_step().name for _ in range(3)]
    ['SAVE', 'NONE', 'NONE']
    """

    def __init__(self, group: HostGroup, ask: Ask) -> None:
        self._group = group
        self._ask = ask
        self._counted: tuple[torch.Tensor, dist.Work] | None = None
        self._saved = False

    def at_step(self) -> Notice:
        """The outcome, alike on all workers; `SAVE` is given once."""
        notice = self._outcome(self._ask())
        if notice is Notice.SAVE:
            if self._saved:
                return Notice.NONE
            self._saved = True
        return notice

    def _outcome(self, own: Notice) -> Notice:
        if self._group.handle is None:
            return own
        before = self.close()
        ballot = torch.tensor(int(own))
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, self._group.handle, async_op=True)
        assert work is not None, "this worker is of the group"
        self._counted = ballot, work
        return before

    def close(self) -> Notice:
        """Wait for the vote that is being counted, and give its outcome."""
        if self._counted is None:
            return Notice.NONE
        ballot, work = self._counted
        self._counted = None
        work.wait()
        return Notice(int(ballot))


class StopSignals:
    """SIGTERM and Ctrl-C, noted instead of obeyed at once.

    Args:
        tell: called at the first one.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self.number: int | None = None

    def notice(self) -> Notice:
        """What was asked for so far."""
        return Notice.NONE if self.number is None else Notice.STOP

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal. A second Ctrl-C does not wait for the checkpoint."""
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            self.number = number
            self._tell()

    def leave(self) -> None:
        """End the run as the signal asked.

        Raises:
            Terminated: by SIGTERM.
            KeyboardInterrupt: by Ctrl-C.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated("terminated, and saved; run the same command again to go on")


@contextmanager
def stop_signals(out: Path) -> Iterator[StopSignals]:
    """Note SIGTERM and Ctrl-C while the body runs, and write the first one's `stop-request`.

    In another thread than the main one, which alone may handle signals, none is noted. A SIGINT
    that whoever started this process has ignored stays ignored.
    """
    request = out / STOP_NAME
    request.unlink(missing_ok=True)
    signals = StopSignals(tell=request.touch)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    noted = [
        number
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    handlers = {number: signal.signal(number, signals.note) for number in noted}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        request.unlink(missing_ok=True)
