"""A part's end of the line to the parent: one JSON object a line, on what was standard output.

Knows rows, attempts and the time left. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, Any, TypeVar

from benchmarks.gpu.parts import Goal

T = TypeVar("T")

ERROR_CHARACTERS = 600
"""The most of an error's text that a row holds."""


class PlannedFault(RuntimeError):
    """Asked for with `--fault`: stands for any fault of a part."""


class Recorder:
    """Sends rows to the parent as soon as they are known.

    limit_s: after so many seconds the parent ends the process. fault: "raise", "hang" or "exit"
    does that after the first row (for tests).

    >>> import io
    >>> recorder = Recorder(io.StringIO(), limit_s=10.0)
    >>> recorder.row("speeds", what="copy", gb_per_s=3000.0, odd=float("nan"))
    >>> recorder.line.getvalue()
    '{"table": "speeds", "row": {"what": "copy", "gb_per_s": 3000.0, "odd": "nan"}}\\n'
    """

    def __init__(
        self, line: IO[str], *, limit_s: float, rehearsal: bool = False, fault: str = ""
    ) -> None:
        self.line, self.rehearsal, self._fault = line, rehearsal, fault
        self._end = time.monotonic() + limit_s
        self.clean: Callable[[], None] = lambda: None
        """Called after every attempt: gives back what a failed one may hold."""

    @property
    def left_s(self) -> float:
        """Seconds until the parent ends this process."""
        return self._end - time.monotonic()

    def row(self, table: str, **columns: Any) -> None:
        """One row of a table: plain values, units in the columns' names."""
        plain = {name: _plain(value) for name, value in columns.items()}
        self._send({"table": table, "row": plain})
        self._do_fault()

    def environment(self, **facts: Any) -> None:
        """Where this part runs."""
        self._send({"environment": {name: _plain(value) for name, value in facts.items()}})

    def figure(
        self, what: str, value: float | None, unit: str, goal: Goal | None = None, note: str = ""
    ) -> None:
        """One number beside its goal. A rehearsal's number is not held against the goal."""
        met = None if goal is None or self.rehearsal else goal.met(value)
        goal_text = None if goal is None else str(goal)
        self.row("figures", what=what, value=value, unit=unit, goal=goal_text, met=met, note=note)

    def missing(self, what: str, why: str) -> None:
        """Say that something is not measured, and why."""
        self.say(f"not measured: {what}: {why}")
        self.row("not measured", what=what, why=why[:ERROR_CHARACTERS])

    def attempt(self, what: str, run: Callable[[], T], *, needs_s: float = 0.0) -> T | None:
        """Measure something whose fault costs only itself: the error becomes a row.

        The result is None then.
        needs_s: with less time left it is not begun. `clean` is called afterwards in any case.
        """
        if self.left_s < needs_s:
            self.missing(what, f"{self.left_s:.0f} s are left, it may take {needs_s:.0f} s")
            return None
        try:
            return run()
        except PlannedFault:
            raise
        except Exception as error:
            traceback.print_exc(limit=-6)
            self.missing(what, f"{type(error).__name__}: {error}")
            return None
        finally:
            self.clean()

    def say(self, message: str) -> None:
        """Progress, for whoever watches."""
        print(f"  {message}", file=sys.stderr, flush=True)

    def _send(self, message: dict[str, Any]) -> None:
        self.line.write(json.dumps(message) + "\n")
        self.line.flush()

    def _do_fault(self) -> None:
        fault, self._fault = self._fault, ""
        if fault == "raise":
            raise PlannedFault("a fault that was asked for")
        if fault == "hang":
            time.sleep(1e6)
        if fault == "exit":
            os._exit(3)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def take_standard_output() -> IO[str]:
    """The line to the parent; what libraries print goes to standard error from now on."""
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return line


def end_with_parent() -> None:
    """End this process and its children when the parent is gone, however it went.

    The parent holds the other end of standard input and never writes to it, so that the end of the
    file is the end of the parent. A person's terminal is no such pipe, and is left alone.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode) or os.getpgrp() != os.getpid():
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()
