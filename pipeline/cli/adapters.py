"""Commands around adapters of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import arguments
from pipeline.cli.options import JsonOption, command, reporter


@command(
    "merge-adapter",
    examples=["flowreel merge-adapter runs/mine/adapter --model runs/demo/train/model -o OUT"],
)
def merge_adapter_command(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, such as RUN/adapter.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(help="Its base model's folder; default: where the adapter says."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model folder at --out.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """An adapter and its base → an ordinary model folder.

    `sample` and `serve` take an adapter's folder too, and merge it each time it is loaded.
    """
    folder = arguments.model_folder(adapter)
    base = None if model is None else arguments.model_folder(model)
    arguments.output_folder(out)
    from pipeline.merge_adapter import merge_adapter

    merge_adapter(folder, out, base=base, overwrite=overwrite, reporter=reporter(json_))
