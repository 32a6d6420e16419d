"""Commands that run the whole in order: demo, on this machine, and submit, on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import arguments
from pipeline.cli.options import (
    AddressOption,
    JsonOption,
    RecipeOption,
    SetOption,
    command,
    reporter,
)

SHORT = (
    "world.num_clips=96", "world.num_images=32", "world.clips_per_shard=32", "train.steps=40",
    "train.checkpoints.every_steps=20", "train.denoiser_from_step=0", "evaluate.prompts=8",
)  # fmt: skip
"""What `--short` changes: enough to see every stage run, too little to learn anything."""


@command(
    resumes=True,
    examples=(
        "flowreel demo",
        "flowreel demo --short",
        "flowreel demo --shards /data/panda --out runs/panda",
    ),
)
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything the run makes.")
    ] = Path("runs/demo"),
    shards: Annotated[
        str | None,
        typer.Option(
            help="WebDataset shards of your own: a folder, a tar, or {00000..00099}.tar; "
            "by default a world of moving shapes is made."
        ),
    ] = None,
    recipe: RecipeOption = "tiny",
    clips: Annotated[
        int | None,
        typer.Option(min=16, help="Video clips to make; default: the recipe's world.num_clips."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; default: the recipe's train.steps.")
    ] = None,
    short: Annotated[
        bool,
        typer.Option(
            "--short",
            help="Every stage in four to seven minutes on a slow laptop; too short to learn.",
        ),
    ] = False,
    set_: SetOption = None,
    address: AddressOption = None,
    json_: JsonOption = False,
) -> None:
    """From nothing to served videos: every stage, and a report at the end.

    Takes about twelve minutes on two cores of a slow laptop.
    """
    arguments.output_folder(out)
    arguments.cluster_address(address)
    from pipeline.recipes import load_recipe

    overrides = [*(SHORT if short else ()), *(set_ or [])]
    if clips is not None:
        overrides.append(f"world.num_clips={clips}")
    if steps is not None:
        overrides.append(f"train.steps={steps}")
    loaded = load_recipe(recipe, overrides)
    paths = arguments.shards(shards, loaded.prepare.source) if shards else None
    from pipeline.stages import demo as run_demo

    said = reporter(json_)
    said.document(run_demo(loaded, out, shards=paths, address=address, reporter=said))


@command(
    examples=["flowreel submit tiny --address http://127.0.0.1:8265 -- --out /mnt/shared/run1"]
)
def submit(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe's name or YAML file.", autocompletion=arguments.complete_recipe
        ),
    ],
    address: Annotated[
        str,
        typer.Option(metavar="URL", help="The cluster's dashboard, such as http://127.0.0.1:8265."),
    ],
    stage: Annotated[
        str,
        typer.Option(
            help="What the job runs: demo, prepare or train.",
            autocompletion=arguments.complete_stage,
        ),
    ] = "demo",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Stay until the job has ended.")
    ] = True,
    set_: SetOption = None,
    arguments_: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- ARGUMENTS]", help="After --: arguments of the stage, such as --out DIR."
        ),
    ] = None,
) -> None:
    """Run a recipe as a job of a Ray cluster."""
    from pipeline.cluster import SUBMITTED_STAGES
    from pipeline.recipes import load_recipe

    arguments.one_of("--stage", stage, SUBMITTED_STAGES)
    loaded = load_recipe(recipe, set_)
    from pipeline.cluster import submit as submit_job

    said = reporter()
    job = submit_job(loaded, address, stage=stage, arguments=arguments_, wait=wait)
    said.outcome(job.logs.rstrip())
    said.outcome(f"job {job.job_id}: {job.status}")
    if job.status not in ("SUCCEEDED", "PENDING", "RUNNING"):
        raise typer.Exit(1)
