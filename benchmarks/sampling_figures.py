"""The sampling benchmark's two figures: residual against sweeps, time against block size.

Knows the samplers of `benchmarks.sampling_case`; matplotlib is loaded only to draw.

Shapes: L tokens of a video, C channels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.sampling_case import GUIDANCE, Case, Sampler
from flow.inverse import Inverter
from flow.tokens import frame_sequence, patchify

BLOCKS = (8, 16, 32, 64, 128, 256, 512)
"""Tokens of the blocks that Jacobi is tried with."""


def _inverter(case: Case) -> tuple[Inverter, Tensor, int]:
    """An inverter of the first video, its noise [1, L, C] in the block's order, tokens a frame."""
    flow, text = case.flow, case.text[:1]
    z_BTHWC = patchify(case.noise[:1], flow.config.patch_size)
    grid = (z_BTHWC.shape[2], z_BTHWC.shape[3])
    inverter = Inverter(
        flow.deep,
        flow.deep_rope(grid, z_BTHWC.shape[1], text),
        batch=1,
        text_BJE=text,
        null_BJE=case.null[:1],
        guidance=GUIDANCE,
    )
    return inverter, frame_sequence(z_BTHWC, flow.deep_reversed), grid[0] * grid[1]


@torch.no_grad()
def residual_curve(case: Case, block: int, sweeps: int) -> list[float]:
    """Root mean square of r over a block of tokens after the first frame, sweep by sweep.

    The first frame is known and exact. Start values repeat its mu and sigma in every frame of the
    block.
    """
    inverter, z, frame = _inverter(case)
    block = min(block, z.shape[1] - frame)
    inverter.restart(frame_sequence(case.exact[:1, :1], case.flow.deep_reversed))
    part, source = slice(frame, frame + block), torch.arange(block) % frame
    z = z[:, part]
    inverter.tokens_BLC[:, part] = inverter.mu_BLC[:, source] + inverter.sigma_BLC[:, source] * z
    curve = []
    for _ in range(min(sweeps, block)):
        inverter.evaluate(part.start, part.stop)
        mu, sigma = inverter.mu_BLC[:, part], inverter.sigma_BLC[:, part]
        r = (inverter.tokens_BLC[:, part] - mu) / sigma - z
        curve.append(float(r.square().mean().sqrt()))
        inverter.tokens_BLC[:, part] = mu + sigma * z
    return curve


def jacobi_seconds(case: Case, block: int, tolerance: float = 1e-3) -> float:
    """Seconds for the first video in blocks of this many tokens; longer ones cross frames."""
    inverter, z, frame = _inverter(case)
    began = time.perf_counter()
    inverter.restart()
    for low in range(0, z.shape[1], block):
        high = min(low + block, z.shape[1])
        start = z[:, low:high]
        if low >= frame:
            inverter.solve(inverter.refresh())
            source = low - frame + torch.arange(high - low) % frame
            start = inverter.mu_BLC[:, source] + inverter.sigma_BLC[:, source] * start
        inverter.solve(inverter.jacobi(z[:, low:high], start, tolerance))
    return time.perf_counter() - began


def draw(case: Case, out: Path, repeats: int = 3) -> list[Path]:
    """Residual against iterations, and time against block size, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    blocks = [b for b in BLOCKS if b <= case.tokens]

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for block in blocks:
        curve = [max(value, 1e-8) for value in residual_curve(case, block, sweeps=40)]
        axes.semilogy(range(1, len(curve) + 1), curve, label=f"{block} tokens")
    axes.set(xlabel="Jacobi sweeps", ylabel="rms of (s − μ)/σ − z over the block")
    axes.legend(title="block", fontsize=8)
    residuals = out / "sampling_residual.png"
    figure.savefig(residuals, dpi=120)
    pyplot.close(figure)

    def median(run: Callable[[], float]) -> float:
        return statistics.median(run() for _ in range(repeats))

    def slide_seconds(size: int) -> float:
        sampler = Sampler("", {"schedule": "sliding", "slide_tokens": size})
        began = time.perf_counter()
        sampler.run(case, 0)
        return time.perf_counter() - began

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    jacobi = [median(lambda b=block: jacobi_seconds(case, b)) for block in blocks]  # type: ignore[misc]
    axes.plot(blocks, jacobi, "o-", label="jacobi, τ = 1e-3")
    windows = [size for size in (8, 16, 24, 32, 40, 48, 64) if size <= case.tokens]
    sliding = [median(lambda s=size: slide_seconds(s)) for size in windows]  # type: ignore[misc]
    axes.plot(windows, sliding, "s-", label="sliding, default tolerance")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in a block or window", ylabel="seconds for one video", ylim=(0, None))
    axes.legend()
    times = out / "sampling_time.png"
    figure.savefig(times, dpi=120)
    pyplot.close(figure)
    return [residuals, times]
