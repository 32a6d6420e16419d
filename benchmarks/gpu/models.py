"""Networks with random weights, made on the device in the dtype they compute in.

Times and memory do not depend on what the weights are. Knows modules; knows nothing of figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def random_network(make: Callable[[], M], device: torch.device, dtype: torch.dtype) -> M:
    """A module in eval mode whose weights were never anywhere but on the device.

    They are the module's own start values, but for output projections: those start at zero, which
    would make every block the identity.
    """
    with torch.device("meta"):
        network = make()
    network = network.to(dtype).to_empty(device=device)
    # Children first: a block then sets what its child drew.
    for module in reversed([*network.modules()]):
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("proj_out.weight"):
                parameter.normal_(std=0.02)
    return network.requires_grad_(False).eval()


def parameter_gb(network: nn.Module) -> float:
    """Gigabytes (1e9 bytes) of its weights."""
    return sum(parameter.nbytes for parameter in network.parameters()) / 1e9


def random_tensor(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, never zeros: products of zeros can be faster than those of data."""
    return torch.randn(*shape, device=device, dtype=dtype)
