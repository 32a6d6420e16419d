"""The command line: `flowreel --help`. Each command is a few lines over a stage; nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import (
    AddressOption,
    RecipeOption,
    SetOption,
    app,
    shards_of,
    show_warning,
    user_errors,
)

__all__ = ["app", "main", "show_warning"]

SHORT = (
    "world.num_clips=96", "world.num_images=32", "world.clips_per_shard=32", "train.steps=40", "train.checkpoints.every_steps=20",
    "evaluate.colour_clips=4",
)  # fmt: skip


@app.command()
@user_errors
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything the run makes.")
    ] = Path("runs/demo"),
    shards: Annotated[
        str | None,
        typer.Option(help="WebDataset shards of your own: a folder, a tar, or {00000..00099}.tar."),
    ] = None,
    recipe: RecipeOption = "tiny",
    clips: Annotated[
        int | None, typer.Option(min=16, help="Video clips to make (recipe: world.num_clips).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps (recipe: train.steps).")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="A minute or two to see it run; too short to learn.")
    ] = False,
    set_: SetOption = None,
    address: AddressOption = None,
) -> None:
    """From nothing to served videos in about ten minutes on two CPU cores: every stage, a report at the end."""
    from pipeline.recipes import load_recipe

    overrides = [*(SHORT if short else ()), *(set_ or [])]
    if clips is not None:
        overrides.append(f"world.num_clips={clips}")
    if steps is not None:
        overrides.append(f"train.steps={steps}")
    loaded = load_recipe(recipe, overrides)
    paths = shards_of(shards) if shards else None
    from pipeline.stages import demo as run_demo

    run_demo(loaded, out, shards=paths, address=address)


# Registered here, so that the help begins with the demo and follows the data.
import pipeline.cli.data  # noqa: E402
import pipeline.cli.model  # noqa: E402, F401


@app.command()
@user_errors
def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or YAML file.")],
    address: Annotated[
        str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")
    ],
    stage: Annotated[str, typer.Option(help="demo, prepare or train.")] = "demo",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Stay until the job has ended.")
    ] = True,
    set_: SetOption = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="After --: arguments of the stage, such as --out DIR."),
    ] = None,
) -> None:
    """Run a recipe as a job of a Ray cluster."""
    from pipeline.recipes import load_recipe

    loaded = load_recipe(recipe, set_)
    from pipeline.cluster import submit as submit_job

    job = submit_job(loaded, address, stage=stage, arguments=arguments, wait=wait)
    typer.echo(job.logs.rstrip())
    typer.echo(f"job {job.job_id}: {job.status}")
    if job.status not in ("SUCCEEDED", "PENDING", "RUNNING"):
        raise typer.Exit(1)


@app.command()
@user_errors
def doctor() -> None:
    """Check this machine: what Flowreel needs, what it found, what to do about it."""
    from pipeline.doctor import examine

    raise typer.Exit(0 if examine() else 1)


def main() -> Any:
    """Entry point. CPU libraries keep to the threads that each stage asks for."""
    warnings.showwarning = show_warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return app()
