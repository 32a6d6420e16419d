"""A model's weights in a larger model that computes the same: more layers, more width, frames.

Knows two configurations, and what each parameter of the larger model must be for the function to
stay. Knows nothing of files or training: a caller reads old tensors and places new ones.

What stays the same, up to rounding:

- More layers: everything. The layers at the end add zero (`proj`, `down` are zero).
- More width, from any M to any M + k: everything. See `_Widening`.
- An image model as a video model: the density of an image, and of a video's first frame. Both are
  read by the same blocks in the same order with the same rotary turns (time 0); later frames meet
  weights that never saw one.
- A denoiser where there was none: the flow. The denoiser starts fresh, and finds no noise.

    GrowthError(FlowreelError, ValueError)    a model that cannot be grown into another; the message
                                              names every field, with both values

Shapes: M old width, W new width, k = W - M, H heads, D head_dim, C channels of a token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.config import FlowConfig
from flowreel.errors import FlowreelError

Read = Callable[[str], Tensor]
"""The old model's parameter of a name."""
Fresh = Callable[[], Tensor]
"""A parameter's whole start value in the new model."""

_MAY_DIFFER = {
    # What data and prompts are like; the networks do not read these.
    *("noise_std", "prompt_fps", "prompt_aspect", "prompt_noise"),
    # How far the denoiser looks: no parameter of it, and nothing of the flow.
    *("denoiser_window", "denoiser_lookahead"),
}
_MAY_GROW = {"shallow_width", "deep_width", "denoiser_layers"}


class GrowthError(FlowreelError, ValueError):
    """A model that cannot be grown into another; the message names every field."""


def growth_problems(old: FlowConfig, new: FlowConfig) -> list[str]:
    """What keeps a model of `old` from being one of `new`: a phrase for each field; none if it can.

    >>> from flow.config import tiny
    >>> growth_problems(tiny(), tiny(deep_width=64, layers_per_block=(1, 1, 1, 5)))
    []
    >>> growth_problems(tiny(deep_width=64), tiny(head_dim=20, shallow_width=40, deep_width=40))
    ['deep_width is 40 but that model has 64, and may only grow', 'head_dim is 20 but that model \
has 32', 'shallow_width is 40 but that model has 32: with another head_dim no head is kept']
    """
    problems = []
    for field in sorted(dataclasses.fields(old), key=lambda f: f.name):
        name = field.name
        before, after = getattr(old, name), getattr(new, name)
        is_of_denoiser = name.startswith("denoiser_") and not old.denoiser
        if before == after or name in _MAY_DIFFER or is_of_denoiser:
            continue
        said = f"{name} is {after!r} but that model has {before!r}"
        if name in ("video", "denoiser"):
            if before:
                problems.append(f"{said}, and does not lose it")
        elif name in _MAY_GROW and after > before:
            if old.head_dim != new.head_dim:
                problems.append(f"{said}: with another head_dim no head is kept")
        elif name in _MAY_GROW:
            problems.append(f"{said}, and may only grow")
        elif name == "layers_per_block" and len(before) == len(after):
            if any(n < m for n, m in zip(after, before, strict=True)):
                problems.append(f"{said}, and blocks may only grow")
        else:
            problems.append(said)
    return problems


@dataclass(frozen=True)
class Growth:
    """The way from a model of `old` to one of `new`, parameter by parameter.

    >>> from flow.config import tiny
    >>> from flow.flow import FlowModel
    >>> small, large = FlowModel(tiny()), FlowModel(tiny(deep_width=64))
    >>> growth, weights = Growth(small.config, large.config), small.state_dict()
    >>> for name, parameter in large.named_parameters():
    ...     whole = growth.tensor(name, weights.__getitem__, lambda: parameter.detach())
    ...     _ = parameter.data.copy_(whole)
    >>> x = torch.randn(1, 2, 4, 2, 2)
    >>> torch.allclose(small.flow(x).z_BTHWC, large.flow(x).z_BTHWC, atol=1e-5)
    True

    Raises:
        GrowthError: see `growth_problems`.
    """

    old: FlowConfig
    new: FlowConfig

    def __post_init__(self) -> None:
        if problems := growth_problems(self.old, self.new):
            raise GrowthError("; ".join(problems))

    def tensor(self, name: str, read: Read, fresh: Fresh) -> Tensor:
        """A parameter of the new model.

        Args:
            name: its name in `FlowModel.named_parameters`.
            read: gives the old model's parameters; asked only for those that are needed.
            fresh: gives the parameter's start value, which new parts keep; asked only where there
                are any.

        Returns:
            The whole tensor, in the dtype of what it is made of.
        """
        stack, rest = _split(name)
        if stack == "denoiser" and not self.old.denoiser:
            return fresh()
        layer = re.match(r"layers\.(\d+)\.(.*)", rest)
        if layer is not None and int(layer[1]) >= self._layers(stack):
            is_last_product = layer[2].startswith(("attention.proj.", "mlp.down."))
            return torch.zeros_like(fresh()) if is_last_product else fresh()
        is_deep = stack == "flow.deep"
        widths = [c.deep_width if is_deep else c.shallow_width for c in (self.old, self.new)]
        if widths[0] == widths[1]:
            return read(name)
        return self._wider(stack, rest, _Widening(*widths), read, fresh)

    def _layers(self, stack: str) -> int:
        """Layers of a stack in the old model."""
        if stack == "denoiser":
            return self.old.denoiser_layers
        block = -1 if stack == "flow.deep" else int(stack.rpartition(".")[2])
        return self.old.layers_per_block[block]

    def _wider(self, stack: str, rest: str, wide: _Widening, read: Read, fresh: Fresh) -> Tensor:
        """A parameter of a stack that gets wider."""
        old = read(f"{stack}.{rest}")
        part = re.sub(r"layers\.\d+\.", "", rest)
        if part in ("sos", "proj_out.bias"):
            return old
        if part.startswith(("proj_in.", "proj_txt.")):
            return wide.written(old)
        if part in ("attention.proj.bias", "mlp.down.bias"):
            return wide.written(old)
        if part in ("attention.proj.weight", "mlp.down.weight"):
            return wide.written(old, torch.zeros_like(fresh()))
        if part.endswith(("norm.weight", "norm.bias")):
            is_gain = part in ("attention.norm.weight", "mlp.norm.weight")
            # Fresh values of what is new: gain 1 (of a GainNorm: weight 0) and bias 0.
            return torch.cat([old / wide.scale if is_gain else old, fresh()[wide.old :]])
        if part.startswith("attention.qkv."):
            # Queries, keys and values one below the other, each with its new heads at the end.
            return _corner(old, fresh(), groups=3)
        if part.startswith("mlp.up."):
            return _corner(old, fresh(), groups=1)
        assert part == "proj_out.weight", f"no rule for {stack}.{rest}"
        gain = 1 + read(f"{stack}.final_norm.weight") if self.old.final_norm else None
        return wide.read_out(old, gain)


def _split(name: str) -> tuple[str, str]:
    """Stack of layers and the name inside it."""
    match = re.match(r"(flow\.shallow\.\d+|flow\.deep|denoiser)\.(.*)", name)
    assert match is not None, f"{name} is in no stack"
    return match[1], match[2]


def _corner(old: Tensor, fresh: Tensor, groups: int) -> Tensor:
    """`fresh` with `old` in the first rows (of each group) and columns."""
    out = fresh.to(old.dtype).clone()
    rows = out.unflatten(0, (groups, -1))
    part = old.unflatten(0, (groups, -1))
    rows[tuple(slice(size) for size in part.shape)] = part
    return out


@dataclass(frozen=True)
class _Widening:
    """Hidden states h of M numbers become h' of W = M + k, and every norm says what it said.

        m = mean(h),  c = sqrt(W / M),   h' = [c (h - m) + m,  m, …, m]

    A LayerNorm takes the mean away, which is m before and after, and the variance is
    (M / W)·c²·var(h) = var(h): with gain / c it gives [LayerNorm(h), 0, …, 0], its ε included. The
    final RMSNorm sees the mean square (M / W)·c²·var(h) + m², which is that of h; and
    h = (h' - m) / c + m is linear in h', for the new channels carry m. So each product that writes
    into h is changed in its rows, and `proj_out` in its columns. New heads and hidden units of an
    MLP are fresh, and the columns that read them are zero; the columns that read new channels are
    fresh, and meet zeros.
    """

    old: int
    new: int

    @property
    def scale(self) -> float:
        """c."""
        return (self.new / self.old) ** 0.5

    def written(self, value: Tensor, into: Tensor | None = None) -> Tensor:
        """A weight [M, n] or bias [M] that writes into h, as one that writes into h'.

        `into`: a weight [W, N] of zeros whose first n columns it becomes.
        """
        wide = value.double()
        mean = wide.mean(0, keepdim=True)
        rows = [
            self.scale * (wide - mean) + mean,
            mean.expand(self.new - self.old, *wide.shape[1:]),
        ]
        out = torch.cat(rows).to(value.dtype)
        if into is None:
            return out
        into = into.to(value.dtype)
        into[:, : out.shape[1]] = out
        return into

    def read_out(self, weight: Tensor, gain: Tensor | None) -> Tensor:
        """`proj_out.weight` [n, M] as one [n, W] that reads h', whose new gains are 1."""
        wide = weight.double()
        added = self.new - self.old
        gained = wide if gain is None else wide * gain.double()
        new = gained.sum(1, keepdim=True) * ((1 - 1 / self.scale) / added)
        return torch.cat([wide / self.scale, new.expand(-1, added)], dim=1).to(weight.dtype)
