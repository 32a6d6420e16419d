"""The command that measures a model: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import arguments
from pipeline.cli.options import (
    GuidanceOption,
    JsonOption,
    ScheduleOption,
    SetOption,
    command,
    reporter,
)


@command(
    examples=(
        "flowreel evaluate runs/demo/train/model --out runs/demo/evaluation",
        "flowreel evaluate runs/demo/train/model --only nats --data runs/demo/latents --json",
        "flowreel evaluate runs/demo/train/model --only prompts --prompts 256",
        "flowreel evaluate runs/demo/train/model --vbench runs/vbench --vbench-first 20",
    )
)
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model folder; default: the weights that ship."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="FAMILY,…",
            help="Measure these only: " + ", ".join(arguments.FAMILIES) + "; default: all.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Latents that `flowreel prepare` wrote, whose held-out clips the likelihood is "
            "of; default: scenes rendered for this."
        ),
    ] = None,
    prompts: Annotated[
        int,
        typer.Option(min=2, max=4096, help="Prompts of seen combinations, and as many of unseen."),
    ] = 64,
    draws: Annotated[int, typer.Option(min=2, max=1024, help="Noise draws per clip.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, scenes and noise.")] = 0,
    guidance: GuidanceOption = None,
    schedule: ScheduleOption = "jacobi",
    long: Annotated[
        str,
        typer.Option(
            metavar="SECONDS,…", help="Lengths of the long video at which its drift is measured."
        ),
    ] = "30,60,120",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for evaluation.json, .md and .html (with videos); default: none.",
        ),
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="MLflow store for figures and files, such as sqlite:///mlflow.db; default: none.",
        ),
    ] = None,
    vbench: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write samples for VBench there instead, five of each of its prompts, and score "
            "them where its package and weights are.",
        ),
    ] = None,
    vbench_prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="VBench's prompt list, VBench_full_info.json; default: the installed package's.",
        ),
    ] = None,
    vbench_first: Annotated[
        int | None, typer.Option(min=1, help="Its first prompts only; default: all.")
    ] = None,
    rewriter: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Who puts VBench's prompts into more words: http://host:port/v1 of an "
            "OpenAI-compatible endpoint, or a language model's folder or hub id; default: nobody.",
        ),
    ] = None,
    rewriter_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The endpoint's model.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Recipe whose world and sampler hold; default: recipe.yaml of the model or its "
            "run, else tiny.",
            autocompletion=arguments.complete_recipe,
        ),
    ] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure a model: likelihood, prompts, sampler, codec, distances, motion, physics, drift.

    Every figure stands beside what it is to be read against: chance, floor, real clips.
    """
    from pipeline.shipped import recipe_beside

    folder = arguments.model_or_shipped(model)
    families = arguments.FAMILIES if only is None else arguments.several("--only", only)
    for family in families:
        arguments.one_of("--only", family, arguments.FAMILIES)
    if data is not None:
        arguments.latents(data)
    lengths = arguments.lengths_s("--long", long)
    arguments.one_of("--schedule", schedule, arguments.schedules())
    if out is not None:
        arguments.output_folder(out)
    if vbench is not None:
        arguments.output_folder(vbench, option="--vbench")
    if vbench_prompts is not None:
        arguments.input_file(vbench_prompts, "VBench's prompt list")
    from pipeline.evaluation.command import (
        VBenchJob,
        evaluate_model,
        sample_for_vbench,
    )
    from pipeline.evaluation.options import Options
    from pipeline.recipes import load_recipe

    loaded = load_recipe(recipe or recipe_beside(folder), set_)
    options = Options(
        only=families,
        data=data,
        prompts=prompts,
        draws=draws,
        seed=seed,
        guidance=loaded.serve.limits.default_guidance if guidance is None else guidance,
        schedule=schedule,  # type: ignore[arg-type]
        long_s=lengths,
        kinds=loaded.world.kinds,
        sampling=loaded.sampler,
    )
    if vbench is None:
        evaluate_model(folder, options, out=out, mlflow=mlflow, reporter=reporter(json_))
        return
    job = VBenchJob(vbench, vbench_prompts, vbench_first, rewriter, rewriter_model)
    sample_for_vbench(folder, options, job, reporter(json_))
