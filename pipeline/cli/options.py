"""What all commands share: the app, the options that several have, and how a command is registered.

`command` gives every command the same manners: `-q` and `-v` (before or after its name), one line
and exit code 2 for a mistake, one line and 130 for Ctrl-C. Imports nothing heavier than typer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from flowreel.errors import FlowreelError, FlowreelWarning
from pipeline.cli import arguments
from pipeline.cli.failures import say_failure, say_line

if TYPE_CHECKING:
    from pipeline.console import Reporter

app = typer.Typer(
    name="flowreel",
    help="Video generation by a normalizing flow (STARFlow-V), on Ray: shards → latents → "
    "checkpoint → video.",
    epilog="Begin with: flowreel demo --short. Every command has its own --help.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="A recipe's name or YAML file; it holds every setting.",
        autocompletion=arguments.complete_recipe,
    ),
]
ModelRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Recipe whose settings hold; default: recipe.yaml of the model or its run, else tiny.",
        autocompletion=arguments.complete_recipe,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting of the recipe, such as train.steps=100; repeatable. "
        "`flowreel settings` lists them.",
        autocompletion=arguments.complete_setting,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to use; by default one is started here and ended afterwards.",
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model folder, such as runs/demo/train/model.",
    ),
]
OptionalModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Model folder; default: the weights that ship."),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="Latents that `flowreel prepare` wrote: a folder, or an s3:// URI.",
    ),
]
DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Latents that `flowreel prepare` wrote: a folder, or an s3:// URI.",
    ),
]
PromptOption = Annotated[
    str,
    typer.Option("--prompt", "-p", help="What is to be seen.", callback=arguments.as_utf8),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Guidance weight; 0 is none, default the recipe's serve.limits.default_guidance.",
    ),
]
ScheduleOption = Annotated[
    str,
    typer.Option(
        help="jacobi (as served), sliding (fewer evaluations) or sequential.",
        autocompletion=arguments.complete_schedule,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="The outcome as JSON on standard output, all other words on standard error."
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only outcomes and errors: no progress, no words.")
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Also what the libraries log, and the traceback of an error."
    ),
]


_RUNNING: ContextVar[typer.Context] = ContextVar("running")
"""The command that runs in this process."""


class VerbosityError(FlowreelError, ValueError):
    """--quiet and --verbose at once."""


@dataclass
class Verbosity:
    """How much is said: asked for before the command's name or after it."""

    quiet: bool = False
    verbose: bool = False

    def add(self, quiet: bool, verbose: bool) -> None:
        """Take in what was asked for in one place, and set the log level by it."""
        quiet, verbose = self.quiet or quiet, self.verbose or verbose
        if quiet and verbose:
            raise VerbosityError("--quiet and --verbose are both given; give one of them")
        self.quiet, self.verbose = quiet, verbose
        if self.verbose:
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


@app.callback()
def everywhere(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="The versions of Flowreel, Python, torch and Ray.")
    ] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What may stand before a command's name."""
    ctx.obj = Verbosity()
    try:
        ctx.obj.add(quiet, verbose)
    except VerbosityError as error:
        raise typer.Exit(say_failure(error) or 1) from error
    if version:
        typer.echo(versions())
        raise typer.Exit(0)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


def versions() -> str:
    """The version of Flowreel and of what decides its results, without importing any of it."""
    said = []
    for name in ("flowreel", "torch", "ray"):
        try:
            said.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            said.append(f"{name} not installed")
    own, *others = said
    return f"{own} ({', '.join([f'Python {platform.python_version()}', *others])})"


def command(
    name: str | None = None,
    *,
    examples: Sequence[str] = (),
    resumes: bool = False,
    hidden: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`.

    Args:
        name: as it is typed; by default the function's.
        examples: calls that a user may copy, shown below the help.
        resumes: the same command, run again, goes on where it was interrupted.
        hidden: leave it out of the list of commands.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def run(*, ctx: typer.Context, quiet: bool, verbose: bool, **chosen: Any) -> None:
            _RUNNING.set(ctx)
            said = ctx.ensure_object(Verbosity)
            try:
                said.add(quiet, verbose)
                body(**chosen)
            except typer.Exit:
                raise
            except BaseException as error:
                code = say_failure(error, resumes=resumes, verbose=said.verbose)
                if code is None:
                    raise
                raise typer.Exit(code) from error

        # typer reads a command's options from its signature: the body's, and the common ones.
        signature = inspect.signature(body, eval_str=True)
        common = {"ctx": typer.Context, "quiet": QuietOption, "verbose": VerboseOption}
        added = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if key == "ctx" else False,
                annotation=annotation,
            )
            for key, annotation in common.items()
        ]
        asked = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
        ]
        run.__signature__ = signature.replace(parameters=[*asked, *added])  # type: ignore[attr-defined]
        epilog = "\n\n".join(["Examples:", *examples]) if examples else None
        app.command(name, hidden=hidden, epilog=epilog)(run)
        return body

    return register


def reporter(as_json: bool = False) -> Reporter:
    """What the running command says its words and its outcome through.

    With JSON, what a library prints goes to standard error as well.
    """
    from pipeline.console import Reporter

    ctx = _RUNNING.get()
    made = Reporter(quiet=ctx.ensure_object(Verbosity).quiet, as_json=as_json)
    if as_json:
        ctx.with_resource(contextlib.redirect_stdout(sys.stderr))
    return made


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our warnings are worded for users: one line, without the place in the code."""
    if issubclass(category, FlowreelWarning):
        say_line(f"warning: {message}")
    else:
        said = warnings.formatwarning(message, category, filename, lineno, line)
        typer.echo(said, err=True, nl=False)
