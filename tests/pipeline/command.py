"""The command as a user runs it, for tests: a real process, its output, its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.places import ROOT

PYTHON = (sys.executable, "-m", "pipeline.cli")


def flowreel(
    *arguments: str,
    timeout_s: float = 250,
    environment: dict[str, str] | None = None,
    stdout: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """A command that has ended, whatever its exit code."""
    return subprocess.run(
        [*PYTHON, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        timeout=timeout_s,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def refused(*arguments: str) -> str:
    """The one line of a command that refuses its arguments, and nothing beside it."""
    ended = flowreel(*arguments)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    return one_line(ended.stderr)


def one_line(stderr: str) -> str:
    """The single line of standard error, which names the command and no object of Python's."""
    (line,) = stderr.splitlines()
    assert line.startswith("flowreel: "), stderr
    for leak in ("PosixPath(", "<_io.", "object at 0x", "Traceback"):
        assert leak not in line
    return line.removeprefix("flowreel: ")


def modules_after(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code, modules that were imported on the way, and standard error."""
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        f"sys.argv = ['flowreel', *{list(arguments)!r}]\ncode = main()\n"
        "sys.__stdout__.write('\\nMODULES ' + ' '.join(sys.modules))\nsys.exit(code)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=ROOT,
        check=False,
    )
    _, _, modules = ended.stdout.rpartition("MODULES ")
    return ended.returncode, set(modules.split()), ended.stderr


def processes_with(mark: str) -> list[psutil.Process]:
    """Processes that inherited the environment of a run."""
    alive = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLOWREEL_TEST_MARK") == mark:
                alive.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return alive


def interrupted(
    *arguments: str,
    when: Callable[[int], bool],
    mark: str,
    stderr: Path,
    timeout_s: float = 240,
    number: signal.Signals = signal.SIGINT,
) -> tuple[int, str]:
    """Exit code and standard output of a command that gets a signal as soon as `when(pid)` holds.

    By default it is that of Ctrl-C.
    """
    with stderr.open("w") as errors:
        process = subprocess.Popen(
            [*PYTHON, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "FLOWREEL_TEST_MARK": mark, "PYTHONUNBUFFERED": "1"},
            # A test run in the background has SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        give_up = time.monotonic() + timeout_s
        while not when(process.pid):
            assert process.poll() is None, f"ended first: {stderr.read_text()}"
            assert time.monotonic() < give_up, f"never so far: {stderr.read_text()}"
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output
    finally:
        process.kill()
        process.communicate()


def none_left(mark: str, timeout_s: float = 20) -> bool:
    """Whether all processes of a run are gone, soon."""
    give_up = time.monotonic() + timeout_s
    while processes_with(mark):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.2)
    return True
