"""Muon: the matrices inside the transformer layers move by orthogonalised momentum.

A step along the momentum changes few directions of a matrix a lot; with all its singular values set
to one it changes every direction alike (K. Jordan, "Muon: an optimizer for hidden layers in neural
networks", 2024). The step is scaled as in arXiv 2502.16982, eq. 4, so that AdamW's learning rate
serves both. On small flows a step of it is worth one and a half of AdamW's (docs/measurements.md).

Works on a worker's own shards: momentum lies sharded; a matrix is gathered to be orthogonalised,
which every worker does alike. Knows nothing of files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.optimizer.sharded import like_parameter, own_part

MOMENTUM = 0.95
"""Share of the old momentum that a step keeps."""
STEP_RMS = 0.2
"""Root mean square of a step's entries over the learning rate: what AdamW's usually have."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of X ← aX + b(XXᵀ)X + c(XXᵀ)²X, which draws singular values of (0, 1] towards 1, within
0.3, in five rounds."""


def is_inner(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of a transformer layer.

    Projections into and out of a network, and what it learns of places, are not.

    >>> is_inner("deep.layers.0.mlp.up.weight", torch.zeros(4, 2))
    True
    >>> is_inner("deep.proj_in.weight", torch.zeros(4, 2))
    False
    """
    return parameter.ndim == 2 and ".layers." in f".{name}"


def orthogonalised(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices of the same singular vectors whose singular values are near 1.

    >>> x = orthogonalised(torch.randn(1, 8, 32), torch.float32)
    >>> bool(((torch.linalg.svdvals(x) - 1).abs() < 0.4).all())
    True
    """
    a, b, c = QUINTIC
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if is_tall else matrices_NRC
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices_NRC.dtype)


class ShardedMuon:
    """Momentum and steps of some matrices.

    Args:
        parameters: the matrices as the network has them, sharded or whole.
        locals_: this worker's part of each, sharing its memory.
        weight_decay: share of a weight that a step of rate 1 takes away.
        dtype: of the products that orthogonalise.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        locals_: Mapping[str, Tensor],
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        self.parameters = dict(parameters)
        self.locals = {name: locals_[name] for name in parameters}
        self.momentum = {
            name: torch.zeros_like(local.detach()) for name, local in self.locals.items()
        }
        self._weight_decay = weight_decay
        self._dtype = dtype

    def step(self, rate: float, scale: Tensor, skip: Tensor) -> None:
        """One update by the gradients over `scale`, left out where `skip` is 1."""
        take = 1 - skip
        shapes: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            shapes[parameter.shape].append(name)
        for (rows, columns), names in shapes.items():
            whole = torch.stack([self._direction(name, scale, take) for name in names])
            size = rate * STEP_RMS * max(rows, columns) ** 0.5
            for name, move in zip(names, orthogonalised(whole, self._dtype), strict=True):
                local = self.locals[name]
                local.mul_(1 - rate * self._weight_decay * take)
                local.sub_(self._own_part(name, move) * (size * take))

    def _direction(self, name: str, scale: Tensor, take: Tensor) -> Tensor:
        """The whole matrix of Nesterov's momentum, on every worker."""
        gradient, momentum = self.locals[name].grad, self.momentum[name]
        assert gradient is not None
        # What is not finite is skipped, and must not touch what is kept.
        gradient = (gradient / scale).nan_to_num(0.0, 0.0, 0.0)
        momentum.lerp_(gradient, (1 - MOMENTUM) * take)
        ahead = like_parameter(gradient.lerp(momentum, MOMENTUM), self.parameters[name])
        return ahead.full_tensor() if isinstance(ahead, DTensor) else ahead

    def _own_part(self, name: str, whole: Tensor) -> Tensor:
        """This worker's rows of a matrix that all have."""
        return own_part(whole, self.parameters[name])
