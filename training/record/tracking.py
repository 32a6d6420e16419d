"""A run in MLflow: what is sent of it, to which store, and in which form.

`tracking.json` in the run's folder says all that MLflow is to know beside the history, so that the
folder alone is enough to send a run, now or later (`feed.py`). How far a run was sent is asked from
the store: every batch of metrics carries the number of steps that are sent with it, so the two
cannot disagree. Only the client API is used, never MLflow's global state, so that two runs in one
process do not meet. mlflow is slow to import; this file imports it only where a store is asked.
Knows nothing of models, steps' insides or Ray.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowreel.files import write_json
from flowreel.values import flattened
from training.sections import TrackingConfig

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

TRACKING_NAME = "tracking.json"
# MLflow takes at most 100 parameters and 1000 metrics a call; older stores refuse values over 500
# characters.
PARAMS_PER_CALL = 90
VALUE_LENGTH = 480
METRICS_PER_CALL = 1000
STEPS_RECORDED = "steps_recorded"
"""The metric that says how many steps the store has; sent in one batch with them."""
IDENTITY_TAG = "flowreel.identity"
OF_MODE = ("loss_nats_per_dim", "denoiser_loss")
"""Values that mean different things in video and image steps: `video/KEY`, `image/KEY`."""
OF_SYSTEM = ("rss_bytes", "device_peak_bytes")
"""Values that MLflow shows among a run's system metrics."""
# A store that does not answer is asked again by us, so MLflow's client need not: with its defaults
# a dead server holds one call for minutes.
DEADLINES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True)
class DatasetInput:
    """A dataset as MLflow shows it among a run's inputs.

    Attributes:
        name, digest: what it is called, and what its content is named by.
        location: path or URI.
        context: what it is used for, such as train.
        profile: its counts, as plain values.
    """

    name: str
    digest: str
    location: str
    context: str
    profile: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelVersion:
    """The exported model as a version in MLflow's registry.

    Attributes:
        name: of the registered model.
        folder: the model folder, absolute.
        tags: where it comes from, and its held-out loss where there is one.
    """

    name: str
    folder: str
    tags: dict[str, str]


@dataclass(frozen=True)
class Tracking:
    """What MLflow is to know of a run beside its history; `tracking.json` holds it.

    Attributes:
        uri, experiment, name: where it goes, and what it is called there.
        params: settings, flat.
        tags: words about the run.
        inputs: datasets.
        identity: chosen once for each run, so that a run whose creation nobody heard of is found.
        run_id: MLflow's; None until the store has answered.
        status: RUNNING, FINISHED, FAILED or KILLED.
        figures: what was measured of the run's end, in lines like the history's.
        artifacts: files, relative to the run's folder.
        model: what is registered; None while there is nothing.
        is_complete: the store has all of it.
    """

    uri: str
    experiment: str
    name: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: tuple[DatasetInput, ...] = ()
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    status: str = "RUNNING"
    figures: tuple[dict[str, Any], ...] = ()
    artifacts: tuple[str, ...] = ()
    model: ModelVersion | None = None
    is_complete: bool = False

    @classmethod
    def read(cls, out: Path) -> Tracking | None:
        """What a run's folder says; None where it says nothing, or an older version wrote it."""
        note = out / TRACKING_NAME
        values = json.loads(note.read_text()) if note.is_file() else {}
        if "identity" not in values:
            return None
        values["inputs"] = tuple(DatasetInput(**value) for value in values["inputs"])
        values["model"] = values["model"] and ModelVersion(**values["model"])
        lists = {key: tuple(values[key]) for key in ("figures", "artifacts")}
        return cls(**{**values, **lists})

    def write(self, out: Path) -> None:
        """Write `tracking.json`, whole or not at all."""
        write_json(out / TRACKING_NAME, asdict(self))

    def continuing(self, earlier: Tracking) -> Tracking:
        """The same, in the MLflow run of an earlier call; in another store, a new run."""
        if (earlier.uri, earlier.experiment) != (self.uri, self.experiment):
            return self
        return replace(self, identity=earlier.identity, run_id=earlier.run_id)


def tracking_uri(config: TrackingConfig, out: Path) -> str:
    """The configured store, or a SQLite file in the run's folder."""
    return config.uri or f"sqlite:///{(out / 'mlflow.db').resolve()}"


def is_server(uri: str) -> bool:
    """Whether a store is asked over HTTP."""
    return uri.startswith(("http://", "https://", "databricks"))


def is_file(uri: str) -> bool:
    """Whether a store is on a disk, and so may be busy but is never away.

    >>> [is_file(uri) for uri in ("sqlite:////runs/mlflow.db", "postgresql://host/db", "mlruns")]
    [True, False, True]
    """
    return uri.startswith(("sqlite:", "file:")) or not (is_server(uri) or "://" in uri)


def plain_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested maps as MLflow's parameters: flat, and no value too long for an older store.

    >>> plain_params({"train": {"steps": 6}})
    {'train.steps': '6'}
    """
    return {key: str(value)[:VALUE_LENGTH] for key, value in flattened(values).items()}


def set_deadlines() -> None:
    """Have MLflow's client give up soon, unless the environment says otherwise.

    The environment is the one place where its client reads this. It is set in the main thread, and
    once: changing it while other threads run is not safe.
    """
    for name, value in DEADLINES.items():
        os.environ.setdefault(name, value)


def mlflow_client(uri: str) -> MlflowClient:
    """A client of the store, which is not asked yet."""
    from mlflow.tracking import MlflowClient

    # Its database migrations are announced line by line, which is nobody's concern here. Importing
    # it sets levels too, so ours come after.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def opened_run(client: MlflowClient, tracking: Tracking, out: Path) -> Run:
    """The run in the store: the one that was begun before, or a new one.

    A run that the store no longer has is replaced by a new one. Parameters, tags and inputs are
    brought up to date; what MLflow does not let change is told by tags (`_send_params`).

    Raises:
        MlflowException: the store does not answer, or refuses.
    """
    run = _known_run(client, tracking) or _created_run(client, tracking, out)
    run_id = str(run.info.run_id)
    # A finished run takes nothing more.
    client.update_run(run_id, status="RUNNING", name=tracking.name)
    _send_params(client, run, tracking.params)
    for key, value in tracking.tags.items():
        client.set_tag(run_id, key, value)
    _send_inputs(client, run_id, tracking.inputs)
    return run


def _known_run(client: MlflowClient, tracking: Tracking) -> Run | None:
    from mlflow.exceptions import MlflowException

    if tracking.run_id is None:
        return None
    try:
        run = client.get_run(tracking.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _created_run(client: MlflowClient, tracking: Tracking, out: Path) -> Run:
    experiment_id = _experiment(client, tracking, out)
    # One that was made but whose answer never came.
    begun = client.search_runs(
        [experiment_id], f"tags.`{IDENTITY_TAG}` = '{tracking.identity}'", max_results=1
    )
    if begun:
        return begun[0]
    tags = {IDENTITY_TAG: tracking.identity}
    return client.create_run(experiment_id, run_name=tracking.name, tags=tags)


def _experiment(client: MlflowClient, tracking: Tracking, out: Path) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        own_store = tracking.uri == tracking_uri(TrackingConfig(), out)
        location = (out / "mlartifacts").resolve().as_uri() if own_store else None
        try:
            return str(client.create_experiment(tracking.experiment, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another run made it in this moment.
            experiment = client.get_experiment_by_name(tracking.experiment)
    return str(experiment.experiment_id)


def _send_params(client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
    """Send parameters that are new; one that has changed is told by tags, for it cannot be changed.

    A resumed run may have other settings than it began with. `now.KEY` holds the value that is
    true now, and `changes` tells them in order.
    """
    from mlflow.entities import Param

    run_id, there = run.info.run_id, run.data.params
    rows = [Param(key, value) for key, value in params.items() if key not in there]
    for start in range(0, len(rows), PARAMS_PER_CALL):
        client.log_batch(run_id, params=rows[start : start + PARAMS_PER_CALL])
    changes = []
    for key, began in there.items():
        known = run.data.tags.get(f"now.{key}", began)
        now = params.get(key, known)
        if now != known:
            client.set_tag(run_id, f"now.{key}", now)
            changes.append(f"step {steps_recorded(run)}: {key} {known} → {now}")
    if changes:
        earlier = [run.data.tags["changes"]] if "changes" in run.data.tags else []
        client.set_tag(run_id, "changes", "\n".join([*earlier, *changes]))


def _send_inputs(client: MlflowClient, run_id: str, inputs: Sequence[DatasetInput]) -> None:
    from mlflow import entities
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    if not inputs:
        return
    client.log_inputs(
        run_id,
        datasets=[
            entities.DatasetInput(
                entities.Dataset(
                    name=value.name,
                    digest=value.digest,
                    source_type="s3" if value.location.startswith("s3://") else "local",
                    source=json.dumps({"uri": value.location}),
                    profile=json.dumps(value.profile),
                ),
                [entities.InputTag(MLFLOW_DATASET_CONTEXT, value.context)],
            )
            for value in inputs
        ],
    )


def steps_recorded(run: Run) -> int:
    """How many steps of a run the store has."""
    return int(run.data.metrics.get(STEPS_RECORDED, 0))


def metric_name(key: str, mode: str | None) -> str:
    """What a value of the history is called in MLflow.

    >>> [metric_name(key, "image") for key in ("loss_nats_per_dim", "step_s", "rss_bytes")]
    ['image/loss_nats_per_dim', 'step_s', 'system/rss_bytes']
    """
    if mode is not None and key in OF_MODE:
        return f"{mode}/{key}"
    return f"system/{key}" if key in OF_SYSTEM else key


def _made_ms(record: Mapping[str, Any]) -> int:
    # With the line's own time a store that got a batch twice knows it: all its columns are equal.
    return int(1000 * record.get("time_s", time.time()))


def metrics_of(record: Mapping[str, Any]) -> list[Metric]:
    """The numbers of a line of the history, with the time at which it was made."""
    from mlflow.entities import Metric

    mode, made_ms = record.get("mode"), _made_ms(record)
    return [
        Metric(metric_name(key, mode), float(value), made_ms, int(record["step"]))
        for key, value in record.items()
        if key not in ("step", "time_s") and isinstance(value, int | float)
    ]


def send_records(client: MlflowClient, run_id: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Send lines of a history, in order; `STEPS_RECORDED` goes with the last of each call.

    Raises:
        MlflowException: the store does not answer, or refuses; what it has, it says itself.
    """
    from mlflow.entities import Metric

    batch: list[Metric] = []
    for number, record in enumerate(records, start=1):
        batch += metrics_of(record)
        following = metrics_of(records[number]) if number < len(records) else None
        if following is None or len(batch) + len(following) >= METRICS_PER_CALL:
            step = int(record["step"])
            batch.append(Metric(STEPS_RECORDED, step + 1, _made_ms(record), step))
            client.log_batch(run_id, metrics=batch)
            batch = []


def send_figures(client: MlflowClient, run_id: str, figures: Sequence[Mapping[str, Any]]) -> None:
    """Send what was measured of a run's end; that is no step, so `STEPS_RECORDED` stays."""
    metrics = [metric for record in figures for metric in metrics_of(record)]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])


def artifact_folder(name: str) -> str | None:
    """The folder among a run's artifacts for a file of its folder, or of one beside it.

    >>> [artifact_folder(name) for name in ("train.json", "samples/0.mp4", "../report.html")]
    [None, 'samples', None]
    """
    parent = Path(name).parent
    return None if parent == Path(".") or ".." in parent.parts else str(parent)
