"""What decides the weights of a run beside its settings: the length of its schedule, and its data.

Both go into a checkpoint's description, so that a run is not resumed on other ones unsaid. Knows
nothing of the loop.
"""

from __future__ import annotations

import hashlib
from typing import Any

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.index import current_manifests
from training.config import TrainConfig
from training.optimizer.optim import LearningRate
from training.state.checkpoint import Checkpoint


def pinned_schedule(config: TrainConfig) -> dict[str, Any]:
    """The length of the cosine, in steps, whichever setting says it."""
    return {"steps": config.optimizer.schedule_steps or config.steps}


def pinned_data(dataset: LatentDataset) -> dict[str, Any]:
    """The records by their names, the bytes of latents and of captions, and the frame rate.

    The bytes by the digests that the manifests hold, so that no file of latents is read.
    """
    digests = {"latents": hashlib.sha256(), "captions": hashlib.sha256()}
    for manifest in current_manifests(dataset.folder):
        for file in manifest.files:
            if file.kind in digests:
                digests[file.kind].update(f"{file.path} {file.sha256}\n".encode())
    contents = {kind: digest.hexdigest()[:16] for kind, digest in digests.items()}
    return {"samples": dataset.ids_digest(), "fps": dataset.info.fps, **contents}


def changed_rate(config: TrainConfig, latest: Checkpoint | None) -> str | None:
    """What another length of the cosine does to the next learning rate; None if it is the same."""
    began = None if latest is None else latest.description.get("schedule")
    if latest is None or began is None or began == pinned_schedule(config):
        return None
    peak = config.optimizer.flow_learning_rate
    rates = [
        LearningRate.of(config.optimizer.model_copy(update={"schedule_steps": steps}), peak, steps)
        for steps in (began["steps"], pinned_schedule(config)["steps"])
    ]
    old, new = (rate.at(latest.step) for rate in rates)
    return (
        f"the cosine of {began['steps']} steps is extended to {rates[1].steps} (train.extend): at "
        f"step {latest.step} the flow's learning rate is {new:.3g}, not {old:.3g}"
    )
