"""Adapters (LoRA) on a model's products: made by `peft`, trained alone, written as a small folder.

peft puts a layer of its own around each chosen product; its adapters are the only parameters that
have gradients, all others are frozen (`frozen.py`). What is written needs no peft to be read
(`flow.adapter`). Knows nothing of losses or steps.

    FlowreelError, ValueError
    └── LoraError    a pattern that matches no product
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from flow.adapter import FIRST, SECOND, AdapterSpec, merged_weight
from flow.flow import FlowModel
from flow.model_folder import ModelSpec, read_spec, write_model
from flowreel.errors import FlowreelError
from training.sections import LoraConfig
from training.start.source import StartPoint
from training.state.checkpoint import CODEC_FOLDER, Checkpoint, load_averaged

_WRAPPED = ".base_layer."
_SECOND_END = ".lora_B.default.weight"
_ENDS = {".lora_A.default.weight": FIRST, _SECOND_END: SECOND}
"""What peft's names of A and B end in, and ours."""


class LoraError(FlowreelError, ValueError):
    """A pattern that matches no product."""


def adapter_targets(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the products (`nn.Linear`) that get an adapter.

    Raises:
        LoraError: a pattern matches none; one for a denoiser may, where there is none.

    >>> net = nn.ModuleDict({"up": nn.Linear(2, 4), "down": nn.Linear(4, 2)})
    >>> adapter_targets(net, ["d*"])
    ['down']
    """
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    for pattern in patterns:
        no_denoiser = getattr(model, "denoiser", None) is None and pattern.startswith("denoiser.")
        if not no_denoiser and not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise LoraError(
                f"train.lora.targets {pattern!r} matches no product; near names: {', '.join(near)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def add_adapters(model: FlowModel, lora: LoraConfig, seed: int) -> None:
    """Put adapters on a model, in place, and freeze all else; before the model is sharded.

    A is drawn from the seed, alike on all workers, and B is zero: the model computes what it did.

    Raises:
        LoraError: see `adapter_targets`.
    """
    # Here and not above: it brings transformers, which a run without adapters does not need.
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number; it is divided by r
        target_modules=adapter_targets(model, lora.targets),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)


@torch.no_grad()
def silence_adapters(model: nn.Module) -> None:
    """Make every B zero, sharded or not: the model computes what it does without adapters."""
    for name, parameter in model.named_parameters():
        if name.endswith(_SECOND_END):
            parameter.zero_()


def plain_name(name: str) -> str | None:
    """A parameter's name in a model without adapters; None for an adapter's own.

    >>> plain_name("flow.deep.layers.0.mlp.up.base_layer.weight")
    'flow.deep.layers.0.mlp.up.weight'
    >>> plain_name("flow.deep.layers.0.mlp.up.lora_A.default.weight") is None
    True
    """
    return None if name.endswith(tuple(_ENDS)) else name.replace(_WRAPPED, ".")


def adapter_tensors(model: FlowModel) -> dict[str, Tensor]:
    """All A and B of a model with adapters, named as an adapter folder has them."""
    return {
        name.removesuffix(end) + ours: value
        for name, value in model.state_dict().items()
        for end, ours in _ENDS.items()
        if name.endswith(end)
    }


def merged_tensors(model: FlowModel, scale: float) -> dict[str, Tensor]:
    """The tensors of an ordinary model that computes what a model with adapters does."""
    adapters = adapter_tensors(model)
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if (plain := plain_name(name)) is None:
            continue
        product = plain.removesuffix(".weight")
        if plain.endswith(".weight") and product + FIRST in adapters:
            pair = adapters[product + FIRST], adapters[product + SECOND]
            value = merged_weight(value, *pair, scale)
        out[plain] = value
    return out


def export_adapted(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    codec: Path | None,
    out: Path,
    adapter_out: Path,
    lora: LoraConfig,
    start: StartPoint,
) -> None:
    """Write a checkpoint's averaged adapters, by themselves and merged into their base.

    Args:
        checkpoint: of a run with adapters.
        spec: what the merged model says of itself.
        codec: its folder, copied into the merged model; None: no codec.
        out: the merged model's folder.
        adapter_out: the adapter's.
        lora, start: how the adapters were made, and on which model.
    """
    with torch.random.fork_rng(devices=[]):
        model = FlowModel(spec.flow)
    add_adapters(model, lora, seed=0)
    load_averaged(checkpoint, model)
    about = AdapterSpec(start.path, start.digest, lora.rank, lora.alpha)
    # A run that is resumed may have outlived its base.
    of_base = read_spec(start.path).codec if Path(start.path).is_dir() else None
    if of_base is None and codec is not None:
        of_base = str(codec.absolute())
    of_adapter = dataclasses.replace(spec, adapter=about, codec=of_base)
    write_model(adapter_out, adapter_tensors(model), of_adapter)
    extra = None if codec is None else {CODEC_FOLDER: codec}
    write_model(out, merged_tensors(model, about.scale), spec, extra=extra)
