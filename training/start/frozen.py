"""Parameters that a run leaves alone: chosen by name patterns, and proved not to have moved.

A frozen parameter has no gradient, no optimizer state and no averaged copy. The digest of all that
is frozen stands in every checkpoint's description. It is compared before each one is written, and
after one was loaded. Knows nothing of what the parameters are for.

    FlowreelError, ValueError
    ├── FreezeError      a pattern that matches nothing, or patterns that leave nothing to train
    └── FrozenChanged    frozen parameters have other values than the run began with
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowreel.errors import FlowreelError
from flowreel.values import digest_of
from training.state.checkpoint import Checkpoint

FROZEN_KEY = "frozen"
"""Of a checkpoint's description: the digest of what was frozen."""
CHUNK = 1 << 24
"""Numbers of a tensor that are summed at once; bounds the memory that this takes."""


class FreezeError(FlowreelError, ValueError):
    """Patterns that freeze nothing, or everything."""


class FrozenChanged(FlowreelError, ValueError):
    """Frozen parameters are not what they were; the message names them, or both digests."""


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that a pattern matches, as file names are matched (`*`, `?`, `[abc]`).

    Raises:
        FreezeError: a pattern matches none, or nothing is left.

    >>> frozen_names(["flow.deep.sos", "flow.shallow.0.sos"], ["flow.shallow.*"])
    {'flow.shallow.0.sos'}
    >>> frozen_names(["flow.deep.sos"], ["flow.deep.sis"])
    Traceback (most recent call last):
    training.start.frozen.FreezeError: train.freeze 'flow.deep.sis' matches no parameter; near \
names: flow.deep.sos. `*` stands for any letters, dots too
    """
    names = list(names)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise FreezeError(
                f"train.freeze {pattern!r} matches no parameter; near names: {', '.join(near)}. "
                "`*` stands for any letters, dots too"
            )
        frozen |= matched
    if len(frozen) == len(set(names)):
        raise FreezeError(
            f"train.freeze {list(patterns)} matches every parameter: leave something to train"
        )
    return frozen


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the gradients of matching parameters away; before the model is sharded.

    Raises:
        FreezeError: see `frozen_names`.
    """
    names = frozen_names((name for name, _ in model.named_parameters()), patterns)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class Frozen:
    """The values of a model's frozen parameters, by a checksum of each.

    >>> layer = nn.Linear(2, 2)
    >>> freeze(layer, ["bias"])
    >>> frozen = Frozen.of(layer)
    >>> frozen.check(layer)
    >>> layer.bias.data[0] += 1
    >>> frozen.check(layer)
    Traceback (most recent call last):
    training.start.frozen.FrozenChanged: frozen parameters have changed during the run: bias
    """

    checksums: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Frozen:
        """What the frozen parameters are now; all workers call it together, and find the same."""
        parts = {
            name: _checksum(parameter.detach())
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        }
        values = torch.stack([*parts.values()]).tolist() if parts else []
        return cls(dict(zip(parts, values, strict=True)))

    def described(self) -> dict[str, str]:
        """What a checkpoint's description says of them; nothing where nothing is frozen."""
        return {FROZEN_KEY: digest_of(self.checksums)} if self.checksums else {}

    def check(self, model: nn.Module) -> None:
        """Hold the parameters against what they were.

        Raises:
            FrozenChanged: naming those that have moved.
        """
        if not self.checksums:
            return
        now = Frozen.of(model).checksums
        if moved := [name for name, value in self.checksums.items() if now.get(name) != value]:
            raise FrozenChanged(
                f"frozen parameters have changed during the run: {', '.join(moved)}"
            )

    def check_loaded(self, checkpoint: Checkpoint) -> None:
        """Hold what was loaded from a checkpoint against what its run says it had.

        Raises:
            FrozenChanged: with both digests.
        """
        recorded, loaded = frozen_of(checkpoint), self.described()
        if recorded != loaded:
            raise FrozenChanged(
                f"{checkpoint.path} holds frozen parameters of digest {loaded.get(FROZEN_KEY)}, "
                f"but its run began with {recorded.get(FROZEN_KEY)}: the checkpoint was damaged; "
                "remove it, and the one before it is used"
            )


def frozen_of(checkpoint: Checkpoint | None) -> dict[str, str]:
    """What a checkpoint's description says of frozen parameters, to be put beside another's."""
    description = {} if checkpoint is None else checkpoint.description
    return {FROZEN_KEY: description[FROZEN_KEY]} if FROZEN_KEY in description else {}


def _checksum(parameter: Tensor) -> Tensor:
    """Σ bits_i·(2i + 1) modulo 2^64 over all numbers of a parameter, 0-dim, on its device.

    Odd factors have inverses, so that no single number changes unseen, and a factor for each place
    tells an exchange. Sharded or not, on a CPU or a GPU, it is the same.
    """
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[whole.element_size()]
    bits = whole.contiguous().reshape(-1).view(integers)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        place = torch.arange(start, start + part.numel(), device=bits.device)
        total += (part * (2 * place + 1)).sum()
    return total
