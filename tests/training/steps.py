"""A few steps of a small model, of one process or of several: what laws of sharing compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flow.config import FlowConfig, tiny
from flow.flow import FlowModel
from tests.training.world import small_config
from training.config import TrainConfig
from training.data.batches import TrainBatch
from training.parallel import join_workers, shard_model
from training.step import TrainStep
from training.weights import build_model

BATCH = 8


def random_model(flow: FlowConfig | None = None) -> FlowModel:
    """A model none of whose weights are zero."""
    model = FlowModel(flow or tiny())
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def random_batch(number: int, size: int = BATCH, frames: int = 3) -> TrainBatch:
    """A whole step's clips, alike on all workers."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, frames, 4, 4, 4, generator=generator)
    text = torch.randn(size, 6, 16, generator=generator)
    return TrainBatch(x, text, ["x"] * size, "video")


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor that may be sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def take_steps(config: TrainConfig, count: int = 2) -> dict[str, Any]:
    """Metrics of every step, the weights after the last, and a held-out pass in between."""
    with join_workers(config.workers) as parallel:
        model = random_model()
        shard_model(model, parallel, config.workers.shard_granularity, config.precision)
        step = TrainStep(model, config, parallel)
        metrics, nats = [], []
        for number in range(count):
            parts = random_batch(number).parts(parallel.world)
            metrics.append(step.take(number, parts[parallel.rank]).values)
            step.swap_ema()
            with torch.no_grad():
                batch = random_batch(99)
                nats.append(step.run_flow(batch.x_noisy, batch.text_BJE).nats().mean())
            step.swap_ema()
        weights = {name: whole(p) for name, p in model.named_parameters()}
        return {
            "metrics": torch.stack(metrics),
            "nats": torch.stack(nats),
            "weights": weights,
            "digest": step.parameter_digest(),
        }


def start_weights(config: TrainConfig) -> dict[str, Tensor]:
    """The weights that a run begins with."""
    with join_workers(config.workers) as parallel:
        model = build_model(tiny(), config, parallel)
        return {name: whole(p) for name, p in model.named_parameters()}


def laws(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`take_steps` and `start_weights` under several settings, one after another."""
    found = []
    for each in settings:
        config = small_config(**each)
        found.append({**take_steps(config), "start": start_weights(config)})
    return found


def difference(one: dict[str, Any], other: dict[str, Any], part: str) -> float:
    """The largest difference of a part of two results."""
    if isinstance(one[part], Tensor):
        return float((one[part] - other[part]).abs().max())
    assert one[part].keys() == other[part].keys()
    return max(float((one[part][n] - other[part][n]).abs().max()) for n in one[part])
