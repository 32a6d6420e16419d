"""Start weights: a model built where there is room for its parts only, and filled from a seed.

The model is made on `meta`, spread over the workers, and only then given memory: no worker ever
holds it whole. Values come from the modules' own `reset_parameters`, under a seed of the run's seed
and the module's name: they are the same on any number of workers. A worker draws the parameters of
one module at a time (at most a few hundred megabytes) and keeps its part of them. Knows nothing of
files, losses or Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from flow.config import FlowConfig
from flow.flow import FlowModel
from training.config import TrainConfig
from training.memory import set_memory
from training.optimizer.sharded import local_tensor, own_part
from training.parallel import Parallel, shard_model
from training.start.frozen import freeze
from training.start.lora import add_adapters, silence_adapters


def build_model(flow: FlowConfig, config: TrainConfig, parallel: Parallel) -> FlowModel:
    """A model with start weights, spread over the workers and run as `config.memory` says."""
    model = _unfilled(flow)
    if config.lora.rank:
        with torch.device("meta"):
            add_adapters(model, config.lora, config.seed)
    set_memory(model, config.memory)
    freeze(model, config.freeze)
    shard_model(model, parallel, config.workers.shard_granularity, config.precision)
    draw_weights(model, config.seed)
    silence_adapters(model)
    return model


def fresh_model(flow: FlowConfig, seed: int) -> FlowModel:
    """The same start weights in one process, on the CPU.

    >>> from flow.config import tiny
    >>> a, b = fresh_model(tiny(), 0), fresh_model(tiny(), 1)
    >>> bool((a.flow.deep.sos == b.flow.deep.sos).any())
    False
    """
    model = _unfilled(flow).to_empty(device="cpu")
    draw_weights(model, seed)
    return model


def _unfilled(flow: FlowConfig) -> FlowModel:
    with torch.device("meta"):
        return FlowModel(flow)


@torch.no_grad()
def draw_weights(model: FlowModel, seed: int) -> None:
    """Fill a model's parameters, each worker its part, with start values of the seed."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for key, drawn in _start_values(module, own, _seed_of(seed, name)).items():
            local = local_tensor(own[key])
            local.copy_(own_part(drawn.to(local.device), own[key]))


def _start_values(
    module: nn.Module, own: Mapping[str, nn.Parameter], seed: int
) -> dict[str, nn.Parameter]:
    """Whole parameters as the module itself draws them, on the CPU; `own` may be parts."""
    drawn = {key: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for key, p in own.items()}
    if not drawn:
        return {}
    # In the place of the module's own while it draws; what it does without stays None.
    kept = module.__dict__["_parameters"]
    module.__dict__["_parameters"] = {**dict.fromkeys(kept), **drawn}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module.reset_parameters()  # type: ignore[operator]
    finally:
        module.__dict__["_parameters"] = kept
    return drawn


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
