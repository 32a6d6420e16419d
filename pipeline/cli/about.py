"""Commands about this machine and these settings: doctor, settings, plan."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipeline.cli.arguments import complete_recipe, complete_section
from pipeline.cli.options import JsonOption, RecipeOption, SetOption, command, reporter


@command(examples=["flowreel doctor", "flowreel doctor --recipe my.yaml --json"])
def doctor(
    recipe: RecipeOption = "tiny",
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Check this machine: what Flowreel and a recipe need, what is there, what to do about it.

    The exit code is 1 where something that is needed is missing.
    """
    from pipeline.recipes import load_recipe

    loaded = load_recipe(recipe, set_)
    from pipeline.doctor import examine

    raise typer.Exit(0 if examine(loaded, reporter(json_)) else 1)


@command(
    examples=(
        "flowreel settings train",
        "flowreel settings prepare.filters",
        "flowreel settings serve.port --json",
    )
)
def settings(
    section: Annotated[
        str | None,
        typer.Argument(
            help="A section, such as train or prepare.filters, or one setting by its key; "
            "default: all.",
            autocompletion=complete_section,
        ),
    ] = None,
    json_: JsonOption = False,
    markdown_: Annotated[
        bool, typer.Option("--markdown", help="All of them as the page of the documentation.")
    ] = False,
) -> None:
    """Every setting with its default, what is allowed, and what it is."""
    from pipeline.settings import markdown, sections

    if markdown_:
        sys.stdout.write(markdown())
        return
    said = reporter(json_)
    chosen = sections(section)
    for part in chosen if not json_ else ():
        rows = [[s.name, s.default_text, s.allowed, s.description] for s in part.settings]
        title = f"{part.name}: {part.summary}"
        said.table(title, ["setting", "default", "allowed", "what it is"], rows, left=True)
    said.document([setting.values() for part in chosen for setting in part.settings])


@command(
    examples=(
        "flowreel plan panda-480p --hardware h200x8",
        "flowreel plan my.yaml --hardware a100 --set train.memory.checkpointing=full --json",
    )
)
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe's name or YAML file.",
            autocompletion=complete_recipe,
        ),
    ],
    hardware: Annotated[
        str,
        typer.Option("--hardware", help="The GPUs that would train: a kind and how many of them."),
    ],
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """What training a recipe would take: memory of a GPU by kind, operations, hours, latents.

    From formulas, without a GPU or data. The exit code is 1 where it would not fit.
    """
    from pipeline.recipes import load_recipe
    from training.hardware import Hardware

    loaded, gpus = load_recipe(recipe, set_), Hardware.of(hardware)
    from pipeline.training_plan import plan_training, show_plan

    made = plan_training(loaded, gpus)
    said = reporter(json_)
    for name, one in made.items():
        if len(made) > 1:
            said.outcome(f"\nstage {name}")
        show_plan(one, said)
    hours = sum(one.hours for one in made.values())
    if len(made) > 1:
        said.outcome(f"\nall stages: {hours:,.0f} hours, {hours * gpus.count:,.0f} GPU hours")
    said.document({"stages": {k: v.to_dict() for k, v in made.items()}, "hours": hours})
    raise typer.Exit(0 if all(one.fits for one in made.values()) else 1)
