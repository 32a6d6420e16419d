"""How fast training is: tokens and operations per second, against this machine's own peak.

    python -m benchmarks.training [--rounds 5] [--threads 1] [--only small]

Three models: the recipe `tiny`; `small`, six blocks that read eight times 576 tokens; `middle`, of
50 million parameters. Each step is ours in fp32, ours in bf16 where the CPU is quick in it, and the
plainest step of the same equations (`plain_step.py`) in fp32, in turn, on the same latents from the
same weights; the losses of the first step must agree. A step is one pass of the flow, one of the
denoiser, both backwards, AdamW and averaged weights.

MFU is a step's operations over what matrix products alone reach here, causal attention counted as
half and in full. A 7B's layers at full length are part 5 of `python -m benchmarks.gpu`.

Knows the training step of one process. Knows nothing of Ray.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.plain_step import PlainStep
from flow.config import FlowConfig
from flow.device import has_quick_bf16
from flow.flow import FlowModel
from pipeline.recipes import load_recipe
from training.config import TrainConfig
from training.data.batches import TrainBatch
from training.parallel import Parallel
from training.record.metrics import step_cost
from training.step import TrainStep
from training.weights import fresh_model

CPU = torch.device("cpu")
AGREE = 1e-4
"""Largest relative difference of the first step's losses in fp32."""


@dataclass(frozen=True)
class Case:
    """A model and what a step sees: `batch` clips of `frames` latent frames of `grid` cells."""

    name: str
    flow: FlowConfig
    batch: int
    frames: int
    grid: tuple[int, int]

    def latents(self) -> TrainBatch:
        """Noise in that shape: the time of a step does not depend on what it sees."""
        generator = torch.Generator().manual_seed(0)
        flow = self.flow
        shape = (self.batch, self.frames, flow.latent_channels, *self.grid)
        x = torch.randn(shape, generator=generator)
        text = torch.randn(self.batch, flow.text_len, flow.text_dim, generator=generator)
        return TrainBatch(x, text, ["x"] * self.batch, "video")


def cases() -> list[Case]:
    """The models that are measured."""
    tiny = load_recipe("tiny")
    # The plain step knows tokens of one cell: the same tokens, given as such.
    as_tokens = {
        "latent_channels": tiny.model.token_dim,
        "patch_size": 1,
        "layers_per_block": list(tiny.model.layers_per_block),
    }
    small = FlowConfig(
        latent_channels=8,
        text_len=12,
        text_dim=24,
        shallow_width=64,
        deep_width=96,
        head_dim=32,
        layers_per_block=(2, 2, 2, 2, 2, 4),
        noise_std=0.5,
        pos_len=8.0,
        denoiser=True,
        denoiser_lookahead="every",
    )
    middle = FlowConfig(
        latent_channels=48,
        text_len=64,
        text_dim=512,
        shallow_width=512,
        deep_width=512,
        head_dim=64,
        layers_per_block=(2, 2, 8),
        noise_std=0.5,
        pos_len=8.0,
        denoiser=True,
        denoiser_layers=4,
    )
    return [
        Case(
            "tiny",
            FlowConfig.from_dict({**tiny.model.to_dict(), **as_tokens}),
            tiny.train.batches.batch_size,
            5,
            (4, 4),
        ),
        Case("small", small, 8, 9, (8, 8)),
        Case("middle", middle, 2, 9, (8, 8)),
    ]


def started(flow: FlowConfig) -> FlowModel:
    """Fresh weights, but for output projections that are not zero: a step must move everything."""
    model = fresh_model(flow, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj_out" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def our_step(case: Case, precision: str) -> Callable[[], tuple[float, float]]:
    """A call that takes a step of ours, and gives both losses before it."""
    config = TrainConfig.model_validate({"precision": precision})
    step, batch = TrainStep(started(case.flow), config, Parallel(0, 1, CPU, None)), case.latents()

    def take() -> tuple[float, float]:
        record = step.take(0, batch).record()
        return float(record["loss_nats_per_dim"] or 0), float(record["denoiser_loss"] or 0)

    return take


def plain_step(case: Case) -> Callable[[], tuple[float, float]]:
    """The same of the plain step."""
    config = TrainConfig().optimizer
    step = PlainStep(started(case.flow), config.flow_learning_rate, config.ema_decay)
    batch = case.latents()
    return lambda: step.take(batch)


def in_turn(
    calls: dict[str, Callable[[], tuple[float, float]]], rounds: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Median seconds of each call, taken in turn so that a busy moment meets all; first losses."""
    losses = {name: call() for name, call in calls.items()}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in took.items()}, losses


def matmul_peak(dtype: torch.dtype, side: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of products of square matrices, the best of a few."""
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def report(case: Case, peaks: dict[str, float], rounds: int) -> float:
    """Print a model's rows; how many times as fast ours in fp32 is as the plain step.

    Raises:
        SystemExit: the two steps do not agree.
    """
    calls = {"ours, fp32": our_step(case, "fp32"), "plain, fp32": plain_step(case)}
    if "bf16" in peaks:
        calls["ours, bf16"] = our_step(case, "bf16")
    times, losses = in_turn(calls, rounds)
    pairs = zip(losses["ours, fp32"], losses["plain, fp32"], strict=True)
    apart = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
    if apart > AGREE:
        raise SystemExit(f"{case.name}: the steps' losses differ by {apart:.1e}: {losses}")
    model = started(case.flow)
    rows, columns = case.grid
    cost = step_cost(
        model,
        case.flow,
        batch=case.batch,
        frames=case.frames,
        height=rows,
        width=columns,
        with_denoiser=True,
    )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"\n{case.name}: {millions:.1f} million parameters, {case.batch} x "
        f"{case.frames * rows * columns} tokens, losses agree to {apart:.0e}"
    )
    for name, seconds in times.items():
        discounted = cost.matmul_flops + cost.attention_flops
        full = discounted + cost.causal_flops
        peak = peaks["bf16" if "bf16" in name else "fp32"]
        print(
            f"  {name:12} {seconds:7.3f} s a step {cost.tokens / seconds:8.0f} tokens/s "
            f"{discounted / seconds / 1e9:7.1f} GFLOP/s  MFU {discounted / seconds / peak:5.1%} "
            f"(attention in full {full / seconds / peak:5.1%})"
        )
    ratio = times["plain, fp32"] / times["ours, fp32"]
    print(f"  ours is {ratio:.2f} times as fast in fp32", end="")
    if "bf16" in peaks:
        print(f", {times['plain, fp32'] / times['ours, bf16']:.2f} times in bf16", end="")
    print()
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="times each step is timed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", choices=[case.name for case in cases()], help="one model alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    peaks = {"fp32": matmul_peak(torch.float32)}
    if has_quick_bf16(CPU):
        peaks["bf16"] = matmul_peak(torch.bfloat16)
    said = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks.items())
    print(f"matrix products of 2048 x 2048, {arguments.threads} thread(s): {said}")
    for case in cases():
        if arguments.only in (None, case.name):
            report(case, peaks, arguments.rounds)
    # Linux counts it in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\nlargest memory of this process: {peak:.1f} GB")


if __name__ == "__main__":
    main()
