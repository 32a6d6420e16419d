"""Standard output and error that degrade instead of failing.

An encoding that cannot print `→` prints `->`. A standard output that takes nothing more (a full
disk behind a redirection, a closed pipe) raises `OutputError`, which no full disk elsewhere can
be taken for. Standard library only, so that it is there before anything else is imported.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys

from flowreel.errors import FlowreelError

SPELLINGS = {
    "→": "->", "←": "<-", "×": "x", "—": "-", "–": "-", "…": "...", "·": "*", "½": "1/2", "±": "+-",
    "≤": "<=", "≥": ">=", "²": "^2", "‖": "||", "σ": "sigma", "τ": "tau", "π": "pi", "ε": "epsilon",
    "φ": "phi", "μ": "mu", "Δ": "delta", "∇": "grad", "−": "-", "‘": "'", "’": "'",
    "“": '"', "”": '"',
}  # fmt: skip
"""What is printed where the encoding of the output has no such character; any other becomes `?`."""
_HANDLER = "flowreel.spelled"


class OutputError(FlowreelError, RuntimeError):
    """Standard output takes nothing more; `closed` tells that its reader went away."""

    def __init__(self, error: OSError) -> None:
        self.closed = error.errno == errno.EPIPE
        why = "its reader closed it" if self.closed else (error.strerror or str(error)).lower()
        super().__init__(f"standard output could not be written: {why}")


def spelled(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler behind `SPELLINGS`.

    >>> codecs.register_error("spelled", spelled)
    >>> "½ → σ, 猫".encode("ascii", "spelled")
    b'1/2 -> sigma, ?'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SPELLINGS.get(character, "?") for character in text), error.end


class _Output(io.TextIOWrapper):
    """Standard output whose failures have a class of their own."""

    original: io.TextIOWrapper
    """Held, because the file that both write to is closed when it is collected."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(error) from error


def guard_streams() -> None:
    """Make standard output and error of this process degrade as this file says."""
    codecs.register_error(_HANDLER, spelled)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `flowreel demo >&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors=_HANDLER)
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and not isinstance(out, _Output):
        out.flush()
        guarded = _Output(
            out.buffer,
            encoding=out.encoding,
            errors=_HANDLER,
            line_buffering=out.line_buffering,
            write_through=out.write_through,
        )
        guarded.original = out
        sys.stdout = guarded


def abandon_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter can end without a word."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                os.dup2(nowhere, stream.fileno())
