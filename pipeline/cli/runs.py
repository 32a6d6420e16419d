"""Commands around a training run: watch it, send it to MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import arguments
from pipeline.cli.options import JsonOption, command, reporter

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="Folder that `flowreel train` writes, such as runs/demo/train."
    ),
]


@command(examples=("flowreel watch runs/mine", "flowreel watch runs/mine --json"))
def watch(run: RunArgument, json_: JsonOption = False) -> None:
    """What a run does just now: losses over their floor, speed, memory, time left.

    In a terminal it is kept up to date until the run is finished; elsewhere it is said once.
    """
    arguments.run_folder(run)
    from pipeline.watch import watch as watch_run

    watch_run(run, reporter(json_))


@command(
    examples=(
        "flowreel track runs/mine",
        "flowreel track runs/mine --uri http://mlflow.example:5000",
    )
)
def track(
    run: RunArgument,
    uri: Annotated[
        str | None,
        typer.Option(help="Another MLflow store to send the whole run to; default: its own."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Send to MLflow what it does not have of a run: after an outage, or to another store.

    A run that is trained on sends this by itself.
    """
    arguments.run_folder(run)
    from training.record.feed import send_folder

    sender = send_folder(run, uri=uri)
    said, tracking = reporter(json_), sender.tracking
    said.outcome(
        f"MLflow run {tracking.run_id} at {tracking.uri}: {sender.steps} steps, {tracking.status}"
    )
    said.document(
        {
            "uri": tracking.uri,
            "run_id": tracking.run_id,
            "steps": sender.steps,
            "status": tracking.status,
        }
    )
