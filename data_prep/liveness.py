"""Whether the processes that a run depends on still answer; if not, the run ends with an error.

Ray ends a driver whose cluster has died with exit code 1 and not a word, after 15 s (its node) or
60 s (its head). So a thread looks once a second, and raises in the main thread before that. Knows
nothing of Ray.

    RayEnded(FlowreelError, RuntimeError)   the cluster went away; the same command goes on
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from flowreel.errors import FlowreelError

_LOOK_EVERY_S = 1.0
_CONNECT_S = 5.0
"""A busy process answers all the same: the system accepts connections for it."""


class RayEnded(FlowreelError, RuntimeError):
    """A process of the cluster went away in the middle of a run."""


class Endpoint(NamedTuple):
    """A process that has to be there."""

    name: str
    host: str
    port: int
    patience_s: float
    """So long it may be away, because it may be started anew."""

    @property
    def shown(self) -> str:
        return f"{self.name} at {self.host}:{self.port}"


def answers(endpoint: Endpoint) -> bool:
    """Whether anybody listens there."""
    try:
        socket.create_connection((endpoint.host, endpoint.port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


@contextmanager
def ended_with(endpoints: Sequence[Endpoint]) -> Iterator[None]:
    """While inside, RayEnded is raised if one of the processes is away for longer than it may be.

    It is raised in the main thread, wherever that waits, as Ctrl-C is. Inside another thread
    nothing is watched, because only the main thread can be interrupted.

    Raises:
        RayEnded: a process went away; or something failed and a process does not answer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is behind a firewall, or only a proxy knows, cannot be watched from here.
    endpoints = [endpoint for endpoint in endpoints if answers(endpoint)]
    over = threading.Event()
    lost: list[str] = []

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if not over.is_set():
            raise RayEnded(lost[0])

    def watch() -> None:
        message = _wait_for_loss(endpoints, over)
        if message:
            lost.append(message)
        # An exception may get lost in a destructor, and what cleans up may wait for the dead: so it
        # is raised until we are out.
        while lost and not over.wait(_LOOK_EVERY_S):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=watch, name="liveness", daemon=True)
    thread.start()
    try:
        yield
    except FlowreelError:
        raise
    except Exception as error:
        gone = next((endpoint for endpoint in endpoints if not answers(endpoint)), None)
        if gone is None:
            raise
        raise RayEnded(f"Ray ended: {gone.shown} does not answer") from error
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def _wait_for_loss(endpoints: Sequence[Endpoint], over: threading.Event) -> str:
    """What to say of the first endpoint that is away for too long; empty once it is `over`."""
    seen_s = dict.fromkeys(endpoints, time.monotonic())
    while not over.wait(_LOOK_EVERY_S):
        for endpoint in endpoints:
            if answers(endpoint):
                seen_s[endpoint] = time.monotonic()
            elif (away_s := time.monotonic() - seen_s[endpoint]) > endpoint.patience_s:
                return f"Ray ended: {endpoint.shown} has not answered for {away_s:.0f} s"
    return ""
