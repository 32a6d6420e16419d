"""The record of an evaluation in MLflow: its figures as metrics, its files as artifacts.

The figures have the names of `evaluation.json`; lists over time are metrics with steps. Evaluating
again into one folder goes on in the same MLflow run.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from flowreel.values import digest_of
from pipeline.evaluation.result import Evaluation
from training.config import TrackingConfig
from training.record.tracking import MetricsLogger, close_mlflow_run, open_mlflow_run

EXPERIMENT = "flowreel evaluation"


def log_to_mlflow(evaluation: Evaluation, uri: str, out: Path, files: list[Path]) -> str:
    """Log to the store at `uri`; returns the run's id.

    Args:
        evaluation: what was found.
        uri: the store, such as sqlite:///mlflow.db.
        out: the folder of `files`, which remembers the run.
        files: what becomes artifacts.
    """
    about = asdict(evaluation.about)
    seconds = about.pop("seconds")
    run = open_mlflow_run(
        TrackingConfig(uri=uri, experiment=EXPERIMENT),
        out,
        params=about,
        dataset=evaluation.about.data or "moving shapes",
        dataset_digest=digest_of(about),
    )
    assert run is not None, "tracking is on by default"
    logger = MetricsLogger(run)
    logger.log([{"step": 0, **evaluation.metrics()}])
    logger.log([{"step": 0, **{f"seconds.{name}": value for name, value in seconds.items()}}])
    for name, values in evaluation.series().items():
        logger.log([{"step": i, name: v} for i, v in enumerate(values) if math.isfinite(v)])
    logger.close()
    close_mlflow_run(run, ok=True, artifacts=files)
    return run.run_id
