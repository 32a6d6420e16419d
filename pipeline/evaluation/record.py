"""The record of an evaluation in MLflow: its figures as metrics, its files as artifacts.

The figures have the names of `evaluation.json`; lists over time are metrics with steps. Evaluating
again into one folder goes on in the same MLflow run. The run that trained the model gets the
figures too, as `evaluation/NAME`, where it is in the same store.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowreel.values import digest_of
from pipeline.evaluation.result import Evaluation
from training.record.feed import add_to_record, send_folder
from training.record.tracking import DatasetInput, Tracking, plain_params

EXPERIMENT = "flowreel evaluation"


def log_to_mlflow(evaluation: Evaluation, uri: str, out: Path, files: list[Path]) -> str:
    """Log to the store at `uri`; returns the run's id.

    Args:
        evaluation: what was found.
        uri: the store, such as sqlite:///mlflow.db.
        out: the folder of `files`, which remembers the run.
        files: what becomes artifacts.

    Raises:
        TrackingError: the store does not answer, or refuses.
    """
    about = asdict(evaluation.about)
    seconds = about.pop("seconds")
    data = evaluation.about.data or "moving shapes"
    model = Path(evaluation.about.model)
    tracking = Tracking(
        uri,
        EXPERIMENT,
        "/".join(model.resolve().parts[-3:]),
        params=plain_params(about),
        tags={"model": str(model.resolve())},
        inputs=(DatasetInput(Path(data).name, digest_of(about), data, "evaluation"),),
        status="FINISHED",
        figures=tuple(_lines(evaluation, seconds)),
        artifacts=tuple(path.name for path in files),
    )
    earlier = Tracking.read(out)
    (tracking if earlier is None else tracking.continuing(earlier)).write(out)
    sent = send_folder(out)
    assert sent.tracking.run_id is not None, "it was sent"
    trained = Tracking.read(model.parent)
    if trained is not None and trained.uri == uri:
        figures = {f"evaluation/{name}": value for name, value in evaluation.metrics().items()}
        add_to_record(model.parent, figures)
    return sent.tracking.run_id


def _lines(evaluation: Evaluation, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """The figures in lines like a history's."""
    took = {f"seconds.{name}": value for name, value in seconds.items()}
    lines: list[dict[str, Any]] = [{"step": 0, **evaluation.metrics()}, {"step": 0, **took}]
    for name, values in evaluation.series().items():
        lines += [{"step": i, name: v} for i, v in enumerate(values) if math.isfinite(v)]
    now = time.time()
    return [{**line, "time_s": now} for line in lines]
