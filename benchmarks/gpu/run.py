"""The parent: each part as a process of its own, its limit kept, its rows collected as they come.

Knows processes, time and the report. Knows nothing of torch: the parent never imports it, so that
no part can hold or break a device for another.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from benchmarks.gpu.parts import BY_NAME, PARTS, Part
from benchmarks.gpu.report import (
    COMPLETE,
    FAILED,
    NOT_RUN,
    OUT_OF_TIME,
    RUNNING,
    PartResult,
    Report,
)

ROOT = Path(__file__).resolve().parents[2]
LEAST_S = 5.0
"""With less time a part is not begun: its process would hardly have loaded torch."""
MARGIN_S = 2.0
"""What a part is told less than it has, so that it may end by itself."""
TAIL_LINES = 12
"""Last lines of a failed part's standard error that the report keeps."""
NO_DEVICE = 4
"""Exit code of a part that finds no CUDA device."""


class NoDevice(RuntimeError):
    """No part can run here, unless as a rehearsal."""


@dataclass(frozen=True)
class Plan:
    """What to run: part names in order, seconds for all of them, flags that their processes get."""

    names: tuple[str, ...]
    total_s: float
    rehearsal: bool = False
    faults: tuple[str, ...] = ()
    """NAME=KIND, see `recorder.Recorder`."""

    def limit_s(self, name: str, left_s: float) -> float:
        """Seconds that a part may take: all that is left but the shares of the parts after it.

        >>> plan = Plan(("machine", "right", "pass"), 100.0)
        >>> [round(plan.limit_s(name, 100.0)) for name in plan.names]
        [14, 45, 100]
        """
        parts = [BY_NAME[other] for other in self.names]
        whole = sum(part.share for part in parts)
        later = parts[self.names.index(name) + 1 :]
        return left_s - self.total_s * sum(part.share for part in later) / whole


def run_all(plan: Plan, folder: Path) -> bool:
    """Run the parts one after another; whether all of them are complete.

    What the folder had of them before is dropped at the start.

    `folder` has `gpu.json` and `gpu.md` at every moment; parts of an earlier run that are not in
    the plan keep their figures there.
    """
    report = Report(folder)
    end = time.monotonic() + plan.total_s
    report.parts |= {name: PartResult() for name in plan.names}
    report.write()
    for part in PARTS:
        if part.name not in plan.names:
            continue
        limit_s = plan.limit_s(part.name, end - time.monotonic())
        run_part(part, limit_s, plan, report)
        result = report.parts[part.name]
        print(
            f"{part.name}: {result.state} after {result.seconds:.0f} s; see {folder}",
            file=sys.stderr,
            flush=True,
        )
    return all(report.parts[name].state == COMPLETE for name in plan.names)


def run_part(part: Part, limit_s: float, plan: Plan, report: Report) -> None:
    """Run one part and put what it says into the report, which is written after every row."""
    made = datetime.now(UTC).isoformat(timespec="seconds")
    result = PartResult(RUNNING, limit_s=round(limit_s, 1), made=made, rehearsal=plan.rehearsal)
    report.parts[part.name] = result
    if limit_s < LEAST_S:
        result.state, result.message = NOT_RUN, f"{max(0.0, limit_s):.0f} s were left for it"
        report.write()
        return
    print(f"{part.name}: {part.title}; at most {limit_s:.0f} s", file=sys.stderr, flush=True)
    began = time.monotonic()
    process = _start(part, limit_s, plan)
    try:
        tail = _collect(process, began + limit_s, result, report)
        result.state, result.message = _verdict(process, tail, result.limit_s)
    except KeyboardInterrupt:
        result.state, result.message = FAILED, "it was interrupted; the rows before that stand"
        raise
    finally:
        # Whatever interrupts the parent, an orphan would hold the device.
        _end(process)
        result.seconds = round(time.monotonic() - began, 1)
        report.write()
    if process.returncode == NO_DEVICE:
        raise NoDevice


def _start(part: Part, limit_s: float, plan: Plan) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name]
    command += ["--limit", f"{limit_s - MARGIN_S:.1f}"]
    command += ["--rehearse"] if plan.rehearsal else []
    for fault in plan.faults:
        name, _, kind = fault.partition("=")
        command += ["--fault", kind] if name == part.name else []
    # Its own session, so that all its children can be ended with it.
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _collect(
    process: subprocess.Popen[str], end: float, result: PartResult, report: Report
) -> Sequence[str]:
    """Take rows until the process ends or its time does; the last lines of its standard error."""
    lines: queue.Queue[str | None] = queue.Queue()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_read_rows, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=_echo, args=(process.stderr, tail), daemon=True),
    ]
    for reader in readers:
        reader.start()
    with contextlib.suppress(queue.Empty):
        while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
            # A line that its process's end has cut says nothing.
            if line.endswith("\n"):
                result.take(json.loads(line))
                report.write()
        # The line is closed; the process itself may take a moment to unload.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        readers[1].join(1.0)
    return tail


def _read_rows(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _echo(stream: IO[str], tail: deque[str]) -> None:
    for line in stream:
        tail.append(line.rstrip())
        print(line, end="", file=sys.stderr, flush=True)


def _verdict(
    process: subprocess.Popen[str], tail: Sequence[str], limit_s: float
) -> tuple[str, str]:
    """State and message of a part whose rows have ended."""
    code = process.poll()
    if code is None:
        return OUT_OF_TIME, f"it was ended after {limit_s:.0f} s; the rows before that stand"
    if code == 0:
        return COMPLETE, ""
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        how += " (the machine's memory may have run out)"
    return FAILED, "\n".join([how, *tail])


def _end(process: subprocess.Popen[str]) -> None:
    """End a part's process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The readers may hold the other two streams.
    if process.stdin is not None:
        process.stdin.close()
