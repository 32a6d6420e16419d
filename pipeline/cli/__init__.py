"""The command line: `flowreel --help`.

    demo.py        the whole in one command: demo, here, and submit, on a cluster
    data.py        around a dataset: prepare, look, inspect, export, merge-latents
    model.py       around a model: train, sample, likelihood, serve, import-weights, train-codec
    runs.py        around a training run: watch, track
    adapters.py    merge-adapter
    evaluation.py  evaluate: every figure of a model
    about.py       doctor, settings and plan
    options.py     the app, the options that several commands have, and `command`
    arguments.py   checks of arguments and paths before anything heavy is imported
    failures.py    how a failure is said: one line and an exit code
    streams.py     output that degrades where it cannot be printed
    __main__.py    `python -m pipeline.cli`

Read `options.py` first, then any command: each is a few lines over what `pipeline` does. `main` is
the entry point; `app` is loaded when it is first asked for, so that Ctrl-C is in good hands before.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

    app: typer.Typer

__all__ = ["app", "main"]


def main() -> int:
    """Run the command that the arguments name; returns its exit code."""
    from pipeline.cli.failures import INTERRUPTS, say_failure
    from pipeline.cli.streams import abandon_output, guard_streams

    INTERRUPTS.install()
    guard_streams()
    try:
        code = _run()
        if INTERRUPTS.seen and not INTERRUPTS.said:
            raise KeyboardInterrupt  # typer ends quietly where it is interrupted itself
        sys.stdout.flush()
    except BaseException as error:
        said = say_failure(error)
        if said is None:
            raise
        code = said
    finally:
        INTERRUPTS.end()
        abandon_output()
    return code


def _run() -> int:
    """The command itself; a wrong argument is one line too."""
    import typer

    from pipeline.cli.failures import MISTAKE, say_line
    from pipeline.cli.options import app, show_warning

    warnings.showwarning = show_warning
    # Otherwise each worker that a tokenizer is forked into prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _register_commands()
    try:
        return app(prog_name=app.info.name, standalone_mode=False) or 0
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "flowreel"
        say_line(f"{error.format_message()} (see `{path} --help`)")
        return MISTAKE


def _register_commands() -> None:
    """Import the files of commands, in the order in which the help lists them."""
    for name in ("demo", "data", "model", "runs", "adapters", "evaluation", "about"):
        importlib.import_module(f"pipeline.cli.{name}")


def __getattr__(name: str) -> Any:
    """`app` with all commands, at first use."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.cli.options import app

    _register_commands()
    globals()["app"] = app
    return app
