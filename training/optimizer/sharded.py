"""Tensors that several workers share: a worker's own part, and that part dressed as the whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this worker, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """A local tensor dressed as `parameter` is sharded: what a checkpoint needs to reshape it."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local.detach(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """This worker's part of a tensor that all have, as `parameter` is sharded; no traffic."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(
        whole.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return everywhere.redistribute(mesh, parameter.placements).to_local()


def on_host(parameter: Tensor) -> Tensor:
    """Zeros in the host's memory, of which this worker has the part that it has of `parameter`."""
    return torch.zeros_like(parameter.detach(), device="cpu", requires_grad=False)
