"""An adapter (LoRA): small matrices that change the products of a base model, merged when read.

    W' = W + (alpha / rank)·B A,    A [rank, in],  B [out, rank]

An adapter folder is a model folder whose `config.json` has the key `adapter`: which model it is
for, by path and digest, and the two numbers above. Its tensors are `NAME.lora_A` and `NAME.lora_B`
for the weight `NAME.weight` of the base. Knows nothing of how an adapter is trained.

Errors: `flow.tensor_files.CheckpointError`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flow.tensor_files import CheckpointError, Shape, TensorFolder

FIRST, SECOND = ".lora_A", ".lora_B"
"""What the names of an adapter's two matrices end in."""


@dataclass(frozen=True)
class AdapterSpec:
    """Which model an adapter changes, and how much.

    Attributes:
        base: the base model's folder, absolute or relative to the adapter's.
        base_digest: of its weights (`flow.tensor_files.weights_digest`).
        rank, alpha: see above.
    """

    base: str
    base_digest: str
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def merged_weight(weight: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """W + scale·B A in fp32 or wider.

    >>> one = torch.ones(1, 1)
    >>> merged_weight(one, 2 * one, 3 * one, scale=0.5)
    tensor([[4.]])
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    first, second = (x.to(weight.device, wide) for x in (first, second))
    return weight.to(wide) + scale * (second @ first)


@dataclass(frozen=True)
class MergedFolder:
    """A base model's tensors with an adapter merged in; reads as `TensorFolder` does."""

    base: TensorFolder
    scale: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """A and B of each weight that is changed, by its name."""

    @classmethod
    def open(cls, folder: Path, spec: AdapterSpec, base: Path | None = None) -> MergedFolder:
        """An adapter over the base that it names, or over the one given.

        The base's weights are read once, for their digest.

        Raises:
            CheckpointError: the base is not there, is another model, or has other shapes.
        """
        base = base_folder(folder, spec) if base is None else base
        hint = f"`flowreel merge-adapter {folder} --model BASE` takes it from another place"
        if not base.is_dir():
            raise CheckpointError(
                f"{folder} is an adapter of the model {base}, which is not there; {hint}"
            )
        files = TensorFolder.open(base)
        tensors: dict[str, Tensor] = {}
        for part in TensorFolder.open(folder).read():
            tensors |= part
        pairs = {
            f"{name.removesuffix(FIRST)}.weight": (first, _second(tensors, name, folder))
            for name, first in tensors.items()
            if name.endswith(FIRST)
        }
        for name, (first, second) in pairs.items():
            shape = (second.shape[0], first.shape[1])
            if files.shapes.get(name) != shape:
                raise CheckpointError(
                    f"{folder} changes {name} of shape {list(shape)}, but in {base} it is "
                    f"{list(files.shapes.get(name, ()))}; {hint}"
                )
        if (digest := files.digest()) != spec.base_digest:
            raise CheckpointError(
                f"{folder} was trained on a model of digest {spec.base_digest}, but {base} has "
                f"{digest}; {hint}"
            )
        return cls(files, spec.scale, pairs)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of all tensors."""
        return self.base.shapes

    def read(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        names: Container[str] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """As `TensorFolder.read`; with dtype None each tensor has the base's."""
        for tensors in self.base.read(device, None, names):
            yield {name: self._merged(name, value, dtype) for name, value in tensors.items()}

    def _merged(self, name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
        out = value
        if name in self.pairs:
            out = merged_weight(value, *self.pairs[name], self.scale)
        if not value.is_floating_point():
            return value
        return out.to(value.dtype if dtype is None else dtype)


def base_folder(folder: Path, spec: AdapterSpec) -> Path:
    """Where an adapter says that its base is."""
    return folder / spec.base


def _second(tensors: Mapping[str, Tensor], first: str, folder: Path) -> Tensor:
    name = first.removesuffix(FIRST) + SECOND
    if name not in tensors:
        raise CheckpointError(f"{folder} has {first} but no {name}")
    return tensors[name]
