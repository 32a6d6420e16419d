"""Bytes that a step takes on one GPU, by kind, from formulas.

P is the number of parameters, S the workers that share one copy of them, M the width of a layer,
C the channels of a token, H the heads of a layer.

    weights, gradients, averaged weights   4P/S each: masters are fp32
    optimizer        8P/S: two moments (muon keeps one for inner matrices); with
                     `offload_optimizer` neither these nor the averages lie on the GPU
    gathered         by layer: two of them in the compute dtype, the gradient of one (in fp32 beside
                     its own dtype), and what is outside of layers; by block or model: the largest
                     such group in fp32
    casts            2P: bf16 copies of weights that are there in fp32, which the forward pass makes
                     (not by layer, where they are gathered in bf16)
    activations      for each place of a sequence in bf16 (in fp32), layer by layer
                       none        40M + 4H + 16   (72M + 4H + 16)
                       selective   10M + 4H        (20M + 4H)
                       full        2M              (4M)
                     one more vector of M in the denoiser's layers, where attention is kept; and
                     12M + 25C for each block of the flow, 12M + 5C for the denoiser
    computed again   the largest layer as under none, with checkpointing

Casts stand beside activations, gradients beside what is computed again, and gradients come as
activations go: the peak has the larger of the two pairs, network by network. With micro-batches
gradients are there all the time. Held against what was measured on an H200 (docs/gpu.md) and
against what graphs keep here, in `tests/training/test_plan.py`. Knows nothing of time, recipes or
files.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from flow.attention import TransformerLayer
from flow.config import FlowConfig
from flow.flow import FlowModel
from training.config import TrainConfig
from training.optimizer.muon import is_inner
from training.parallel import networks
from training.sections import Checkpointing


@dataclass(frozen=True, order=True)
class StepShape:
    """The clips, or images, of one kind of step: latent frames, rows and columns of cells."""

    frames: int
    rows: int
    columns: int
    batch: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by kind."""

    weights: float
    gradients: float
    optimizer: float
    averaged: float
    gathered: float
    casts: float
    activations: float
    computed_again: float
    peak: float


def layer_bytes(width: int, head_dim: int, how: Checkpointing, precision: str) -> float:
    """What a layer keeps for one place of a sequence."""
    wide = precision != "bf16"
    heads = width / head_dim
    if how == "full":
        return (4 if wide else 2) * width
    if how == "selective":
        return (20 if wide else 10) * width + 4 * heads
    return (72 if wide else 40) * width + 4 * heads + 16


def activation_bytes(
    flow: FlowConfig, shape: StepShape, how: Checkpointing, precision: str
) -> tuple[float, float]:
    """(flow's, denoiser's) for `shape.batch` samples on one GPU."""
    places, text = _places(flow, shape), shape.batch * flow.text_len
    deep_places = places + (text if flow.deep_text else 0)
    *shallow_layers, deep_layers = flow.layers_per_block
    shallow = layer_bytes(flow.shallow_width, flow.head_dim, how, precision)
    deep = layer_bytes(flow.deep_width, flow.head_dim, how, precision)
    of_flow = places * sum(
        n * shallow + 12 * flow.shallow_width + 25 * flow.token_dim for n in shallow_layers
    )
    of_flow += deep_places * deep_layers * deep
    of_flow += places * (12 * flow.deep_width + 25 * flow.token_dim)
    if not flow.denoiser:
        return of_flow, 0.0
    joined = 0 if how == "full" else flow.shallow_width * (2 if precision == "bf16" else 4)
    read = places + (text if flow.denoiser_text else 0)
    of_denoiser = read * flow.denoiser_layers * (shallow + joined)
    of_denoiser += places * (12 * flow.shallow_width + 5 * flow.token_dim)
    return of_flow, of_denoiser


def _places(flow: FlowConfig, shape: StepShape) -> float:
    per_frame = (shape.rows // flow.patch_size) * (shape.columns // flow.patch_size)
    return shape.batch * shape.frames * per_frame


def count_of(module: nn.Module) -> int:
    """Parameters of a network; sharded ones count whole."""
    return sum(p.numel() for p in module.parameters())


def gathered_bytes(model: FlowModel, config: TrainConfig) -> float:
    """What stands of whole weights beside a worker's own part."""
    if config.workers.strategy == "single":
        return 0.0
    layers = [m for m in model.modules() if isinstance(m, TransformerLayer)]
    outside = count_of(model) - sum(map(count_of, layers))
    largest = max(map(count_of, layers))
    if config.workers.shard_granularity == "layer":
        each = 2 if config.precision == "bf16" else 4
        return largest * (2 * each + each + 4) + outside * 4
    groups = [*model.flow.shallow, model.flow.deep]
    if config.workers.shard_granularity == "model":
        groups = [model.flow]
    return 4 * max(map(count_of, [*groups, *([model.denoiser] if model.denoiser else [])]))


def _is_cast(config: TrainConfig) -> bool:
    """Whether products read bf16 copies of weights that lie there in fp32."""
    by_layer = config.workers.strategy != "single" and config.workers.shard_granularity == "layer"
    return config.precision == "bf16" and not by_layer


def memory_of(
    model: FlowModel, config: TrainConfig, shape: StepShape, *, averaged: bool = True
) -> Memory:
    """One GPU's at a step of which it computes `shape.batch` samples at once."""
    flow, workers, how = model.config, config.workers, config.memory.checkpointing
    shards = {"single": 1, "ddp": 1, "fsdp": workers.count, "hsdp": workers.shard_size or 1}
    share = 4 / shards[workers.strategy]
    sizes = {name: count_of(network) for name, network in networks(model).items()}
    total = sum(sizes.values())
    by_muon = 0
    if config.optimizer.kind == "muon":
        by_muon = sum(p.numel() for n, p in model.named_parameters() if is_inner(n, p))
    kept = dict(
        zip(("flow", "denoiser"), activation_bytes(flow, shape, how, config.precision), strict=True)
    )
    again = 0.0
    if how != "none":
        width = max(flow.deep_width, flow.shallow_width)
        places = _places(flow, shape) + shape.batch * flow.text_len
        again = places * layer_bytes(width, flow.head_dim, "none", config.precision)
    gradients = {name: share * size for name, size in sizes.items()}
    casts = {name: 2.0 * size if _is_cast(config) else 0.0 for name, size in sizes.items()}
    moving, there = 0.0, 0.0
    for name, of_network in gradients.items():
        forward, backward = kept[name] + max(casts[name], again), of_network + again
        moving = max(moving, there + max(forward, backward))
        there += of_network
    if config.batches.accumulate > 1:
        moving = there + max(kept[n] + max(casts[n], again) for n in sizes)
    optimizer = share * (2 * total - by_muon)
    average = share * total if averaged else 0.0
    if config.memory.offload_optimizer:
        optimizer = average = 0.0
    gathered = gathered_bytes(model, config)
    return Memory(
        weights=share * total,
        gradients=sum(gradients.values()),
        optimizer=optimizer,
        averaged=average,
        gathered=gathered,
        casts=max(casts.values()),
        activations=max(kept.values()),
        computed_again=again,
        peak=share * total + optimizer + average + gathered + moving,
    )
