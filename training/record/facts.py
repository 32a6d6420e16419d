"""What MLflow is told of a training run beside its history: names, words, inputs, its model.

Knows nothing of how it is sent.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.latents.dataset import LatentDataset
from flow.config import FlowConfig
from flow.flow import FlowModel
from training.record.history import read_history
from training.record.registry import DATA_TAG, LOSS_TAG, STEPS_TAG
from training.record.tracking import (
    DatasetInput,
    ModelVersion,
    Tracking,
    plain_params,
    tracking_uri,
)
from training.sections import TrackingConfig


def count_parameters(flow: FlowConfig) -> int:
    """Weights of a model, which are not made for it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in FlowModel(flow).parameters())


def short_count(count: int) -> str:
    """A number of parameters as a model is called by it.

    >>> [short_count(count) for count in (92_180, 3_140_000, 7_000_000_000)]
    ['92K', '3.1M', '7B']
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{float(f'{count / size:.2g}'):g}{unit}"
    return str(count)


def run_name(recipe: str | None, out: Path) -> str:
    """What a run is called: its recipe, and the last two names of its folder.

    >>> run_name("tiny", Path("/data/runs/demo/train"))
    'tiny demo/train'
    """
    folder = "/".join(out.resolve().parts[-2:])
    return folder if recipe is None else f"{recipe} {folder}"


def dataset_input(dataset: LatentDataset, digest: str, context: str) -> DatasetInput:
    """A split of a dataset with the clips of every bucket."""
    location = dataset.folder.where()
    clips = {str(bucket): len(ids) for bucket, ids in dataset.buckets.items()}
    name = "/".join(location.rstrip("/").split("/")[-2:])
    return DatasetInput(name, digest, location, context, {"clips": len(dataset), **clips})


def tracking_of(
    config: TrackingConfig,
    out: Path,
    *,
    recipe: str | None,
    flow: FlowConfig,
    trajectory: str,
    params: Mapping[str, Any],
    inputs: Sequence[DatasetInput],
) -> Tracking:
    """What is known of a run before its first step.

    Args:
        trajectory: digest of all that decides its weights.
        inputs: datasets; the first is what it trains on.
    """
    data, size = inputs[0], short_count(count_parameters(flow))
    tags = {
        "dataset": data.name,
        DATA_TAG: data.digest,
        "model_size": size,
        "trajectory": trajectory,
        "flowreel_version": importlib.metadata.version("flowreel"),
        "folder": str(out.resolve()),
        "mlflow.source.name": "flowreel train",
        # The text at the top of the run's page.
        "mlflow.note.content": f"{size} parameters on {data.profile['clips']} clips of {data.name}",
    }
    if recipe is not None:
        tags["recipe"] = recipe
    return Tracking(
        tracking_uri(config, out),
        config.experiment,
        run_name(recipe, out),
        params=plain_params(params),
        tags=tags,
        inputs=tuple(inputs),
    )


def model_version(tracking: Tracking, history: Path, model_dir: Path, steps: int) -> ModelVersion:
    """The exported model as a version: from which data and run, and how good on held-out clips."""
    tags = {key: tracking.tags[key] for key in ("dataset", DATA_TAG, "model_size")}
    tags |= {STEPS_TAG: str(steps), "run_name": tracking.name}
    measured = [record for record in read_history(history) if record.get(LOSS_TAG) is not None]
    # That of the exported weights, not of some earlier ones.
    if measured and int(measured[-1]["step"]) == steps - 1:
        tags[LOSS_TAG] = str(measured[-1][LOSS_TAG])
    name = tracking.tags.get("recipe", tracking.experiment)
    # MLflow refuses these in a name.
    return ModelVersion(re.sub(r"[/:]", "-", name), str(model_dir.resolve()), tags)
