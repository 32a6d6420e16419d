"""How a failure is said: one line and an exit code.

    a mistake that a user can mend             2     a FlowreelError, a path, a full disk
    Ctrl-C                                     130
    SIGTERM during a training, which is saved  143
    standard output closed by its reader       141
    a fault of the code                        1     it keeps its traceback

Standard library only (and `flowreel.errors`), so that a failing or interrupted import can still be
said.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType

from flowreel.errors import FlowreelError, Terminated
from pipeline.cli.streams import OutputError

MISTAKE, INTERRUPTED, CLOSED, TERMINATED = 2, 130, 141, 143
"""Exit codes."""
_LOOK_AGAIN_S = 0.5
_FULL = ("No space left on device", "Disk quota exceeded", "database or disk is full")


class Interrupts:
    """Ctrl-C as a KeyboardInterrupt that cannot get lost.

    Some libraries drop the exception while they are imported, and Python drops it inside
    destructors. So, until it has been said, a timer looks whether it is still on its way up, and
    raises it again where it is not. Libraries that turn it into an exception of their own are
    recognised by `seen`.
    """

    def __init__(self) -> None:
        self.seen = False
        self.said = False

    def install(self) -> None:
        """Take SIGINT, unless whoever started this process has it ignored."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_interrupt)
            signal.signal(signal.SIGALRM, self._on_timer)
            sys.unraisablehook = _on_dropped

    def say(self) -> None:
        """It is said: no timer any more."""
        self.said = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def end(self) -> None:
        """The command is over: let nothing interrupt the last steps of the interpreter."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.seen:
            # Where C code ran Python source while we were interrupted, as some libraries do when
            # they are imported, the interpreter notes an interruption that nobody handled, and
            # kills itself by SIGINT at its very end instead of giving our exit code. Running any
            # source that way forgets the note.
            ctypes.pythonapi.PyRun_SimpleString(b"pass")

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.seen = True
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_S, _LOOK_AGAIN_S)
        raise KeyboardInterrupt

    def _on_timer(self, _number: int, _frame: FrameType | None) -> None:
        # While `finally` blocks clean up, the interruption is what is being handled: let them.
        handled = sys.exc_info()[1]
        on_its_way = handled is not None and any(
            isinstance(link, KeyboardInterrupt) for link in _chain(handled)
        )
        if self.seen and not self.said and not on_its_way:
            raise KeyboardInterrupt


def _on_dropped(dropped: sys.UnraisableHookArgs) -> None:
    """An exception that Python cannot raise; of an interruption the timer takes care."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)


INTERRUPTS = Interrupts()
"""Of this process; the command line's `main` installs it."""


def say_failure(
    error: BaseException, *, resumes: bool = False, verbose: bool = False
) -> int | None:
    """Say a failure in one line on standard error; returns the exit code, None for a fault.

    Args:
        resumes: whether the same command, run again, goes on where it was interrupted.
        verbose: print the traceback before the line.
    """
    if INTERRUPTS.said:
        return INTERRUPTED  # pressed again while the first is being obeyed
    if INTERRUPTS.seen or isinstance(error, KeyboardInterrupt):
        INTERRUPTS.say()
        code = INTERRUPTED
        text = "interrupted" + ("; run the same command again to go on" if resumes else "")
    elif (mistake := mistake_of(error)) is not None:
        code, text = MISTAKE, mistake
        if isinstance(error, OutputError) and error.closed:
            code = CLOSED
        elif isinstance(error, Terminated):
            code = TERMINATED
    else:
        return None
    if verbose:
        traceback.print_exception(error)
    say_line(text)
    return code


def say_line(text: str) -> None:
    """One line on standard error, if that still takes one."""
    try:
        print(f"flowreel: {one_line(text)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return  # nobody reads it; the exit code still tells


def one_line(text: object) -> str:
    """A message without line breaks."""
    return " ".join(str(text).split())


def mistake_of(error: BaseException) -> str | None:
    """What a user can mend, as a sentence; None for a fault of the code.

    >>> mistake_of(FileNotFoundError(2, "No such file or directory", "a.mp4"))
    'a.mp4: no such file or folder'
    >>> mistake_of(OSError(28, "No space left on device"))
    'the disk is full: free some space, then run the same command again'
    >>> mistake_of(KeyError("x"))
    """
    if isinstance(error, FlowreelError):
        return one_line(error)
    for link in _chain(error):
        if _is_full_disk(link):
            path = getattr(link, "filename", None)
            where = "the disk is full" if path is None else f"{shown(path)}: the disk is full"
            return f"{where}: free some space, then run the same command again"
    if isinstance(error, OSError) and error.filename is not None:
        return _path_mistake(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        if importlib.util.find_spec(package) is None:
            return (
                f"the package {package!r} is not installed; `flowreel doctor` says what is missing"
            )
    return None


def shown(path: object) -> str:
    """A path as a user writes it, whatever class holds it."""
    return os.fsdecode(path) if isinstance(path, bytes | str | os.PathLike) else str(path)


def _path_mistake(error: OSError) -> str:
    path = shown(error.filename)
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file or folder"
    if isinstance(error, PermissionError):
        return f"{path}: no permission; choose another path, or change who may use this one"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder; give a file"
    if isinstance(error, NotADirectoryError):
        return f"{path}: a part of this path is a file, not a folder"
    return f"{path}: {(error.strerror or type(error).__name__).lower()}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, then those that led to it."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # SQLite and safetensors have exceptions of their own, which keep only the words.
    return not isinstance(error, AssertionError) and any(words in str(error) for words in _FULL)
