"""Part 5: a training step of as many of the deep block's layers as fit, at the clip's full length.

A step is what a single process takes: fp32 masters, bf16 products under autocast, the loss's
backward (`training.objective`), AdamW. Activation checkpointing is torch's, put around each layer
here. Operations are those of `training.record.metrics`: 6 per weight and token, attention's
products counted once as causal (half) and once in full; what checkpointing computes again is not.

Knows the deep block. Knows nothing of workers or data; how it is scaled to the whole model is said
in the rows.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.device import free, memory_gb, peak_gb, time_once
from benchmarks.gpu.machine import machine_rates
from benchmarks.gpu.models import random_network, random_tensor
from benchmarks.gpu.parts import STEP_GOAL
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.shapes import Shapes
from benchmarks.iteration import Rates
from flow.config import FlowConfig
from flow.flow import FlowModel, FlowOutput
from training.objective import flow_backward
from training.record.metrics import StepCost, step_cost

USABLE = 0.9
"""Share of the memory that a step may plan with: the allocator cannot use all of it."""
TRIES = 4
"""How many times a layer less is tried where memory does not suffice."""
COMPILE_S = 75.0
"""What compiling the layers' forward and backward may take; with less left it is not begun."""
PLAIN, CHECKPOINTED, COMPILED = "none", "every layer", "none, layers compiled"


@dataclass(frozen=True)
class Timed:
    """One step: its layers, seconds and operations, and the most gigabytes at once."""

    layers: int
    seconds: float
    cost: StepCost
    peak_gb: float | None

    @property
    def causal_flop(self) -> float:
        """Operations with causal attention counted in half."""
        return self.cost.matmul_flops + self.cost.attention_flops

    @property
    def full_flop(self) -> float:
        """Operations with attention counted as if nothing were masked."""
        return self.cost.matmul_flops + 2 * self.cost.attention_flops


def measure(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """All rows of the part."""
    rates = machine_rates(shapes, device)
    best: Timed | None = None
    for how in (PLAIN, CHECKPOINTED):
        run = functools.partial(_most, recorder, shapes, device, rates, how)
        timed = recorder.attempt(f"a step, checkpointing {how}", run, needs_s=10.0)
        if timed is not None and (best is None or _rate(timed) > _rate(best)):
            best = timed
    if best is not None:
        needs_s = 0.0 if recorder.rehearsal else COMPILE_S
        layers = min(best.layers, 2)
        run = functools.partial(_timed, shapes, device, layers, COMPILED, recorder.rehearsal)
        compiled = recorder.attempt("a step, layers compiled", run, needs_s=needs_s)
        if compiled is not None:
            _show(recorder, shapes, rates, COMPILED, compiled)
            best = max(best, compiled, key=_rate)
        recorder.figure(
            "training step", _rate(best) / 1e12, "TFLOP/s", STEP_GOAL, "causal attention in half"
        )


def _rate(timed: Timed) -> float:
    return timed.causal_flop / timed.seconds


def _most(
    recorder: Recorder, shapes: Shapes, device: torch.device, rates: Rates, how: str
) -> Timed:
    """The step with the most layers that fit, and what it says of all of them."""
    layers = _layers_that_fit(recorder, shapes, device, how)
    timed: Timed | None = None
    for count in range(layers, max(0, layers - TRIES), -1):
        try:
            timed = _timed(shapes, device, count, how)
            break
        except torch.OutOfMemoryError:
            recorder.say(f"{count} layers do not fit")
            if count == max(1, layers - TRIES + 1):
                raise
        free()
    assert timed is not None
    _show(recorder, shapes, rates, how, timed)
    free()
    half = max(1, timed.layers // 2)
    if half < timed.layers and recorder.left_s > 5 * timed.seconds:
        other = _timed(shapes, device, half, how)
        _show(recorder, shapes, rates, how, other)
        _scale(recorder, shapes, how, timed, other)
    return timed


def _layers_that_fit(recorder: Recorder, shapes: Shapes, device: torch.device, how: str) -> int:
    """Layers whose peak fits, from the peaks of one and of two."""
    if device.type == "cpu":
        return shapes.step_layers
    peaks = []
    for layers in (1, 2):
        peaks.append(_timed(shapes, device, layers, how, samples=0).peak_gb or 0.0)
        free()
    each = max(1e-3, peaks[1] - peaks[0])
    room = USABLE * memory_gb(device) - peaks[0]
    recorder.say(f"checkpointing {how}: {peaks[0]:.1f} GB with one layer, {each:.1f} for each more")
    return max(1, min(shapes.step_layers, 1 + int(room / each)))


def _timed(
    shapes: Shapes,
    device: torch.device,
    layers: int,
    how: str,
    rehearsal: bool = False,
    *,
    samples: int = 3,
) -> Timed:
    """Median seconds of a step after one to warm up (which makes the optimizer's state)."""
    config = _config(shapes, layers)
    model = random_network(lambda: FlowModel(config), device, torch.float32)
    _prepare(model, how, rehearsal)
    step = make_step(model, config, shapes, device)
    free()
    step()
    seconds = [time_once(step, device) for _ in range(samples)]
    cost = step_cost(
        model,
        config,
        batch=1,
        frames=shapes.latent_frames,
        height=shapes.grid[0],
        width=shapes.grid[1],
        with_denoiser=False,
    )
    return Timed(layers, statistics.median(seconds or [0.0]), cost, peak_gb(device))


def _config(shapes: Shapes, layers: int) -> FlowConfig:
    """The deep block alone, with so many layers."""
    return replace(shapes.config, layers_per_block=(layers,), denoiser=False)


def _prepare(model: FlowModel, how: str, rehearsal: bool) -> None:
    model.requires_grad_(True).train()
    for layer in model.flow.deep.layers:
        if how == CHECKPOINTED:
            # An instance's attribute hides the class's method.
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
        if how == COMPILED:
            layer.compile(dynamic=False, backend="eager" if rehearsal else "inductor")


def make_step(
    model: FlowModel, config: FlowConfig, shapes: Shapes, device: torch.device
) -> Callable[[], None]:
    """A step on one random clip: backward under autocast, then AdamW."""
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    shape = (1, shapes.latent_frames, config.latent_channels, *shapes.grid)
    x_BTCHW = random_tensor(*shape, device=device)
    text = random_tensor(1, config.text_len, config.text_dim, device=device)

    def run_flow(x: Tensor, text_BJE: Tensor | None) -> FlowOutput:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output: FlowOutput = model.flow(x, text_BJE)
        return output

    def step() -> None:
        flow_backward(run_flow, x_BTCHW, text, config.noise_std, with_target=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _show(recorder: Recorder, shapes: Shapes, rates: Rates, how: str, timed: Timed) -> None:
    recorder.row(
        "training step",
        layers=timed.layers,
        of_layers=shapes.config.layers_per_block[-1],
        checkpointing=how,
        tokens=timed.cost.tokens,
        seconds=timed.seconds,
        tflop_per_s=_rate(timed) / 1e12,
        tflop_per_s_attention_in_full=timed.full_flop / timed.seconds / 1e12,
        share_of_product_rate=_rate(timed) / rates.flop_per_s,
        peak_gb=timed.peak_gb,
    )


def _scale(recorder: Recorder, shapes: Shapes, how: str, many: Timed, few: Timed) -> None:
    """What follows for the whole: a straight line through two numbers of layers."""
    layers = shapes.config.layers_per_block[-1]
    each_s = (many.seconds - few.seconds) / (many.layers - few.layers)
    deep_s = many.seconds + (layers - many.layers) * each_s
    with torch.device("meta"):
        whole = FlowModel(shapes.config)
    cost = step_cost(
        whole,
        shapes.config,
        batch=1,
        frames=shapes.latent_frames,
        height=shapes.grid[0],
        width=shapes.grid[1],
        with_denoiser=whole.denoiser is not None,
    )
    flop = cost.matmul_flops + cost.attention_flops
    recorder.row(
        "scaled to the whole",
        checkpointing=how,
        deep_block_s=deep_s,
        deep_block_is=f"a straight line through {few.layers} and {many.layers} layers",
        whole_model_s=flop / _rate(many),
        whole_model_is="its operations at the rate measured; with sharded states, traffic apart",
        whole_model_pflop=flop / 1e15,
    )
