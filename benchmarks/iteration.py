"""What one pass of the deep block costs, by context and window, against what the machine allows.

    python -m benchmarks.iteration [--preset video-7b] [--context 300 17000 33000]
                                   [--window 32 128 512] [--dtype bf16]

Weights are random and so is the cache: the time of a pass does not depend on them. (How many passes
a video takes does; see `benchmarks.sampling`.) The floor is the larger of bytes over the bandwidth
and operations over the product rate, both measured here.

Knows the deep block and its cache. Knows nothing of Ray or diffusers.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flow.block import AffineBlock
from flow.config import PRESETS, FlowConfig
from flow.inverse import Inverter
from flow.rope import build_rope

SMALL = FlowConfig(
    latent_channels=48,
    text_len=12,
    text_dim=24,
    shallow_width=64,
    deep_width=256,
    head_dim=32,
    layers_per_block=(1, 1, 1, 4),
    noise_std=0.3,
    pos_len=8.0,
    denoiser=False,
)
"""For a look on a CPU."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Rates:
    """What the machine does at best."""

    bytes_per_s: float
    """Bytes read and written per second by a large copy."""
    flop_per_s: float
    """Operations per second in a large product."""


@dataclass(frozen=True)
class Cost:
    """What a pass must at least move and compute."""

    num_bytes: float
    flop: float

    def floor_ms(self, rates: Rates) -> float:
        """Milliseconds at the machine's best rates, moving and computing at once."""
        seconds = max(self.num_bytes / rates.bytes_per_s, self.flop / rates.flop_per_s)
        return 1e3 * seconds


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after two calls to warm up."""
    times = []
    for index in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index > 1:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Bandwidth by copying a large tensor (read and written), rate by a large square product."""
    on_gpu = device.type == "cuda"
    count = 2**30 if on_gpu else 2**26
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * count / seconds_of(lambda: target.copy_(source), device, 10)
    size = 8192 if on_gpu else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    return Rates(copied, 2 * size**3 / seconds_of(lambda: a @ a, device, 10))


def cost_of(config: FlowConfig, context: int, window: int, dtype: torch.dtype) -> Cost:
    """Bytes and operations of one guided pass over `window` places after `context` others."""
    layers, width = config.layers_per_block[-1], config.deep_width
    size = dtype.itemsize
    weights = layers * 12 * width**2
    keys = layers * 2 * 2 * (context + window) * width
    products = 2 * weights * 2 * window
    attention = layers * 2 * 4 * window * (context + window) * width
    return Cost(size * (weights + keys), products + attention)


def build(config: FlowConfig, device: torch.device, dtype: torch.dtype) -> AffineBlock:
    """A deep block with small random weights, made on the device."""
    with torch.device("meta"):
        block = AffineBlock(config, config.num_blocks - 1)
    block = block.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(std=0.02)
    return block.eval()


def inverter_at(
    block: AffineBlock, config: FlowConfig, context: int, window: int, device: torch.device
) -> Inverter:
    """A guided inverter whose cache is full up to `context` places, text among them."""
    side = 32
    frames = -(-(context + window) // side**2) + 1
    text = torch.randn(1, config.text_len, config.text_dim, device=device)
    rope = build_rope(
        head_dim=config.head_dim,
        pos_len=config.pos_len,
        grid=(side, side),
        num_frames=frames,
        text_len=config.text_len,
        device=device,
    )
    inverter = Inverter(block, rope, batch=1, text_BJE=text, null_BJE=text.clone(), guidance=2.5)
    for cache in inverter.caches:
        cache.kv_2BHSD.normal_()
    inverter.tokens_BLC.normal_()
    return inverter


@torch.inference_mode()
def measure(
    block: AffineBlock, config: FlowConfig, context: int, window: int, repeats: int
) -> tuple[float, float]:
    """(seconds, peak gigabytes) of one guided pass over `window` places after `context` others."""
    device = block.sos.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    inverter = inverter_at(block, config, context, window, device)
    inverter.expect(window)
    start = max(0, context - config.text_len)
    seconds = seconds_of(lambda: inverter.evaluate(start, start + window), device, repeats)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return seconds, peak


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.iteration", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", choices=[*PRESETS, "small"], help="default: video-7b on a GPU")
    parser.add_argument("--context", type=int, nargs="+", default=[300, 17_000, 33_000])
    parser.add_argument("--window", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--dtype", choices=[*DTYPES], help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    preset = options.preset or ("video-7b" if on_gpu else "small")
    config = SMALL if preset == "small" else PRESETS[preset]()
    dtype = DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
    name = torch.cuda.get_device_name() if on_gpu else platform.machine()
    rates = measure_rates(device, dtype)
    block = build(config, device, dtype)
    count = sum(p.numel() for p in block.parameters()) / 1e6
    print(f"deep block of {preset}, {count:.1f}M parameters, {dtype}, guidance on, batch 1")
    print(
        f"{name}, torch {torch.__version__}: {rates.bytes_per_s / 1e9:.0f} GB/s, "
        f"{rates.flop_per_s / 1e12:.2f} TFLOP/s measured"
    )
    print(f"{'context':>8}{'window':>8}{'ms':>9}{'floor ms':>10}{'share':>7}{'peak GB':>9}")
    for context in options.context:
        for window in options.window:
            seconds, peak = measure(block, config, context, window, options.repeats)
            floor = cost_of(config, context, window, dtype).floor_ms(rates)
            print(
                f"{context:>8}{window:>8}{1e3 * seconds:>9.2f}{floor:>10.2f}"
                f"{floor / 1e3 / seconds:>7.2f}{peak:>9.1f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
