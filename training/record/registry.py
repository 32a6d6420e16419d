"""The exported model as a version in MLflow's model registry, and which version is the best.

A version names the run and the data that it comes from. The alias `best` points at the version of
least held-out loss on its data; losses on other data do not compare, so a first version on new data
takes the alias over. Knows nothing of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from training.record.tracking import ModelVersion, is_server

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

BEST = "best"
LOSS_TAG, DATA_TAG, STEPS_TAG = "held_out_nats_per_dim", "dataset_digest", "steps"
UPLOAD_BYTES = 256 << 20
"""A model up to this size is uploaded to a server; of a larger one its description is."""


def register_model(client: MlflowClient, run: Run, model: ModelVersion) -> str:
    """Make the run's model a version, or find that it is one; returns the version's number.

    In a store of files the version's source is the model folder itself. A server takes no path of
    another machine, so there the folder becomes an artifact of the run; where it is larger than
    `UPLOAD_BYTES` that is its `config.json` alone, and the tag `folder` says where the weights are.

    Raises:
        MlflowException: the store does not answer, or refuses.
    """
    known = _version_of(client, run, model)
    if known is not None:
        return known
    _ensure_registered(client, model.name)
    run_id, folder, source = str(run.info.run_id), Path(model.folder), model.folder
    if is_server(client.tracking_uri):
        source = f"{run.info.artifact_uri}/model"
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size_bytes <= UPLOAD_BYTES:
            client.log_artifacts(run_id, str(folder), "model")
        else:
            client.log_artifact(run_id, str(folder / "config.json"), "model")
    made = client.create_model_version(
        model.name,
        source,
        run_id,
        tags={**model.tags, "folder": model.folder, "mlflow_run": run_id},
        await_creation_for=0,
    )
    _move_best(client, model, str(made.version))
    return str(made.version)


def _version_of(client: MlflowClient, run: Run, model: ModelVersion) -> str | None:
    """The version that this run's weights after these steps are, if they are one."""
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    same = [
        version
        for version in versions
        if version.name == model.name and version.tags.get(STEPS_TAG) == model.tags.get(STEPS_TAG)
    ]
    if not same:
        return None
    # Sent anew, the alias may not have been reached before.
    _move_best(client, model, str(same[0].version))
    return str(same[0].version)


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _move_best(client: MlflowClient, model: ModelVersion, version: str) -> None:
    if LOSS_TAG not in model.tags:
        return
    aliases = client.get_registered_model(model.name).aliases
    if BEST in aliases:
        best = client.get_model_version(model.name, aliases[BEST]).tags
        same_data = best.get(DATA_TAG) == model.tags.get(DATA_TAG)
        if same_data and float(best[LOSS_TAG]) <= float(model.tags[LOSS_TAG]):
            return
    client.set_registered_model_alias(model.name, BEST, version)
