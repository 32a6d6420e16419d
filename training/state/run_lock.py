"""One run at a time on a folder, and the workers of one run.

The driver holds the folder for the whole run; worker 0 holds the right to write there, because
workers may outlive a killed driver for a moment. A dead process holds nothing. Knows nothing of
what is written.

    FlowreelError, RuntimeError
    └── RunBusy    another process trains into this folder
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from flowreel.errors import FlowreelError
from flowreel.locks import LockHeld, file_lock
from training.state.group import HostGroup

RUN_LOCK = ".lock"
WRITER_LOCK = ".lock-writer"
_DYING_S = 90.0
"""How long the workers of a killed run may take to go, in seconds."""


class RunBusy(FlowreelError, RuntimeError):
    """Another process trains into this folder; the message names it."""


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Hold a run's folder, made where there is none, against every other run.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp())
    >>> with lock_run(out), lock_run(out):  # doctest: +ELLIPSIS
    ...     pass
    Traceback (most recent call last):
    ...
    training.state.run_lock.RunBusy: ... is being trained by process ...

    Raises:
        RunBusy: naming host, process and since when.
    """
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_held(out, RUN_LOCK, wait_s=0.0))
        yield


@contextmanager
def lock_writing(out: Path, group: HostGroup) -> Iterator[None]:
    """Hold the right to write a run's checkpoints and history: worker 0, for all.

    Workers of a killed run are waited for.

    Raises:
        RunBusy: on all workers, naming who keeps it.
    """
    busy: RunBusy | None = None
    with ExitStack() as stack:
        if group.is_first:
            out.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(_held(out, WRITER_LOCK, wait_s=_DYING_S))
            except RunBusy as error:
                busy = error
        busy = group.of_first(busy)
        if busy is not None:
            raise busy
        yield


@contextmanager
def _held(out: Path, name: str, *, wait_s: float) -> Iterator[None]:
    path = out / name
    with ExitStack() as stack:
        try:
            file = stack.enter_context(file_lock(path, wait_s=wait_s))
        except LockHeld as error:
            raise RunBusy(
                f"{out} is being trained by {_holder(path)}: wait for it, stop it, or train into "
                "another folder"
            ) from error
        file.truncate(0)
        file.write(json.dumps(_myself()))
        file.flush()
        yield


def _myself() -> dict[str, str | int]:
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(path: Path) -> str:
    """Who wrote the lock's file; it is empty for a moment after it was taken."""
    try:
        about = json.loads(path.read_text())
    except ValueError:
        return "another process, which has just begun"
    return f"process {about['pid']} on {about['host']} since {about['since']}"
