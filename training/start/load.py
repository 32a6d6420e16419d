"""The weights that a run starts from, in its own model: grown where it is larger, and sharded.

Every worker reads what it needs itself, a tensor at a time: there is no second copy of the model,
and nothing is sent. `source.py` knows where weights lie, `flow.growth` how they grow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from flow.flow import FlowModel
from flow.growth import Growth
from training.optimizer.sharded import local_tensor
from training.start.lora import plain_name
from training.start.source import StartPoint, open_start


@torch.no_grad()
def load_start(model: FlowModel, start: StartPoint) -> None:
    """Overwrite a fresh model, sharded or not, with the weights of a smaller or equal one.

    Adapters stay as they are.

    All workers call it together: the start values that new parts keep are gathered from their
    shards.
    """
    source = open_start(start.path)
    growth = Growth(source.flow, model.config)

    def read(name: str) -> Tensor:
        # Half precision on disk must not round what growth makes of it.
        value = source.read(name)
        return value.to(torch.promote_types(value.dtype, torch.float32))

    for name, parameter in model.named_parameters():
        if (plain := plain_name(name)) is not None:
            _fill(parameter, growth.tensor(plain, read, _Fresh(parameter)))


class _Fresh:
    """A parameter's whole start value, gathered when asked for."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter.detach()

    def __call__(self) -> Tensor:
        value = self._parameter
        return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def _fill(parameter: Tensor, whole: Tensor) -> None:
    """Put a whole tensor, which all workers have, where this worker keeps its part of it."""
    whole = whole.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        # Without a source rank nothing is sent: each worker takes its part of its own copy.
        part = distribute_tensor(
            whole, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        local_tensor(parameter.detach()).copy_(part.to_local())
    else:
        parameter.copy_(whole)
