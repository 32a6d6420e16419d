"""What all commands share: the app, options that several have, and how mistakes are said."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Annotated, ParamSpec, TextIO, TypeVar

import typer

OURS = ("flow", "media", "data_prep", "training", "serving", "pipeline")
P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="flowreel",
    help="Video generation by a normalizing flow (STARFlow-V), on Ray: shards, latents, training, serving.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a recipe value: key.path=value, such as train.steps=100. Repeatable.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="Ray cluster to use; by default one is started here and ended afterwards."
    ),
]
PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="What is to be seen.")]


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the mistakes a user can mend into one line and exit code 2; anything else keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except Exception as error:
            # Whose class it is decides: ours are worded for users, any other is a fault and keeps its traceback.
            package = type(error).__module__.split(".")[0]
            if package not in OURS and not isinstance(error, FileNotFoundError):
                raise
            typer.echo(f"flowreel: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("flowreel: interrupted; run the same command again to go on", err=True)
            raise typer.Exit(130) from None

    return wrapped


def shards_of(pattern: str) -> list[str]:
    """The shards that a user names."""
    from data_prep.sources.find import find_shards

    return find_shards(pattern)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our warnings are worded for users: one line, without the place in the code."""
    if category.__module__.split(".")[0] in OURS:
        typer.echo(f"flowreel: warning: {message}", err=True)
    else:
        said = warnings.formatwarning(message, category, filename, lineno, line)
        typer.echo(said, err=True, nl=False)
