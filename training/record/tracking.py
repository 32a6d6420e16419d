"""The record of training in MLflow: opened by the driver, fed by worker 0, continued on resumption.

The MLflow run's id lies beside the checkpoints in `tracking.json`, so that training which is
resumed goes on in the same MLflow run. Only the client API is used, never MLflow's global state, so
that two runs in one process do not meet. mlflow is slow to import; this file imports it only where
a run is opened or fed. Knows nothing of models, steps' insides or Ray.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowreel.files import write_json
from flowreel.values import flattened
from training.config import TrackingConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TRACKING_NAME = "tracking.json"
# MLflow takes at most 100 parameters a call; older stores refuse values over 500 characters.
PARAMS_PER_CALL = 90
VALUE_LENGTH = 480
METRICS_PER_CALL = 1000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MlflowRun:
    """Where training is recorded; all that a worker needs.

    Attributes:
        uri: the store's address.
        run_id: the run in it.
    """

    uri: str
    run_id: str


def tracking_uri(config: TrackingConfig, out: Path) -> str:
    """The configured store, or a SQLite file in the run's folder."""
    return config.uri or f"sqlite:///{(out / 'mlflow.db').resolve()}"


def _client(uri: str) -> MlflowClient:
    # Its database migrations are announced line by line, which is nobody's concern here.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _experiment(client: MlflowClient, config: TrackingConfig, out: Path) -> str:
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    own_store = config.uri is None
    location = (out / "mlartifacts").resolve().as_uri() if own_store else None
    return str(client.create_experiment(config.experiment, artifact_location=location))


def open_mlflow_run(
    config: TrackingConfig,
    out: Path,
    *,
    params: Mapping[str, Any],
    dataset: str | Path,
    dataset_digest: str,
) -> MlflowRun | None:
    """Open a run, or go on in the one that `out/tracking.json` names; None where tracking is off.

    A run that the store no longer has is replaced by a new one.

    Args:
        params: plain values, nested maps too, that MLflow shows as parameters.
        dataset, dataset_digest: what MLflow shows as the run's input.
    """
    if not config.enabled:
        return None
    from mlflow.entities import Dataset, DatasetInput, Param
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(config, out)
    client = _client(uri)
    note = out / TRACKING_NAME
    if note.is_file():
        earlier = json.loads(note.read_text())
        if earlier["uri"] == uri:
            try:
                client.update_run(earlier["run_id"], status="RUNNING")
                return MlflowRun(uri, earlier["run_id"])
            except MlflowException as error:
                _log.warning(
                    "MLflow run %s is gone (%s); opening a new one", earlier["run_id"], error
                )
    run = client.create_run(_experiment(client, config, out), run_name=out.resolve().name)
    run_id = str(run.info.run_id)
    rows = [Param(key, str(value)[:VALUE_LENGTH]) for key, value in flattened(params).items()]
    for start in range(0, len(rows), PARAMS_PER_CALL):
        client.log_batch(run_id, params=rows[start : start + PARAMS_PER_CALL])
    source = Dataset("latents", dataset_digest, "local", json.dumps({"uri": str(dataset)}))
    client.log_inputs(run_id, datasets=[DatasetInput(source)])
    write_json(note, {"uri": uri, "run_id": run_id})
    return MlflowRun(uri, run_id)


def close_mlflow_run(
    run: MlflowRun | None,
    *,
    ok: bool,
    tags: Mapping[str, str] | None = None,
    artifacts: Sequence[Path] = (),
) -> None:
    """End a run as finished or failed, with files and tags of the result; None is let pass."""
    if run is None:
        return
    client = _client(run.uri)
    for key, value in (tags or {}).items():
        client.set_tag(run.run_id, key, value)
    for path in artifacts:
        client.log_artifact(run.run_id, str(path))
    client.set_terminated(run.run_id, "FINISHED" if ok else "FAILED")


class MetricsLogger:
    """Sends records to MLflow from a thread of its own; training never waits for the store.

    Args:
        run: where to; None makes an object that drops everything.

    >>> logger = MetricsLogger(None)
    >>> logger.log([{"step": 0, "loss_nats_per_dim": 0.1}])
    >>> logger.close()
    """

    def __init__(self, run: MlflowRun | None) -> None:
        self._queue: queue.Queue[list[dict[str, Any]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if run is not None:
            self._thread = threading.Thread(target=self._send, args=(run,), name="mlflow")
            self._thread.start()

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Hand over records that have a `step`; numbers in them become metrics."""
        if self._thread is not None and records:
            self._queue.put([dict(r) for r in records])

    def close(self) -> None:
        """Send what is left and stop."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _send(self, run: MlflowRun) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        client = _client(run.uri)
        while (records := self._queue.get()) is not None:
            now = int(time.time() * 1000)
            metrics = [
                Metric(key, float(value), now, int(record["step"]))
                for record in records
                for key, value in record.items()
                if key != "step" and isinstance(value, int | float)
            ]
            try:
                for start in range(0, len(metrics), METRICS_PER_CALL):
                    client.log_batch(run.run_id, metrics=metrics[start : start + METRICS_PER_CALL])
            except MlflowException as error:
                # Training goes on without its record; the history file has everything.
                _log.warning("MLflow at %s took no metrics: %s", run.uri, error)
