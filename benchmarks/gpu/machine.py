"""Part 1: what the machine does at best, and the roof of one pass that follows from it.

Knows copies, products and small launches. Knows nothing of how far the model's code is from that.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.device import time_calls
from benchmarks.gpu.models import random_tensor
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.shapes import Shapes
from benchmarks.iteration import Cost, Rates, cost_of

SMALL_LAUNCHES = 200


def measure(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """All figures of the part."""
    rates = recorder.attempt("rates", lambda: machine_rates(shapes, device))
    if rates is not None:
        recorder.figure(
            "copy bandwidth", rates.bytes_per_s / 1e9, "GB/s", note="bytes read and bytes written"
        )
        recorder.figure(
            f"{shapes.dtype} product rate",
            rates.flop_per_s / 1e12,
            "TFLOP/s",
            note=f"{shapes.square} x {shapes.square}, random numbers",
        )
        for context in shapes.contexts:
            for window in shapes.windows:
                _roof(recorder, shapes, rates, context, window)
    recorder.attempt("fp32 product rate", lambda: _fp32_rate(recorder, shapes, device))
    recorder.attempt("launches and looks", lambda: _latencies(recorder, shapes, device))
    recorder.attempt("attention", lambda: _attention_kernels(recorder, device))


def machine_rates(shapes: Shapes, device: torch.device) -> Rates:
    """Bytes per second of a large copy, operations per second of a large product in the dtype."""
    bytes_per_s = _copy_rate(shapes, device)
    return Rates(bytes_per_s, _product_rate(shapes, device, getattr(torch, shapes.dtype)))


def _copy_rate(shapes: Shapes, device: torch.device) -> float:
    source = torch.empty(shapes.copied_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = time_calls(lambda: target.copy_(source), device, samples=shapes.samples, calls=3)
    return 2 * shapes.copied_bytes / copy.median


def _product_rate(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> float:
    size = shapes.square
    a, b = (random_tensor(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = time_calls(lambda: torch.mm(a, b, out=out), device, samples=shapes.samples, calls=3)
    return 2 * size**3 / product.median


def _fp32_rate(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    rate = _product_rate(shapes, device, torch.float32)
    recorder.figure("float32 product rate", rate / 1e12, "TFLOP/s", note="without TF32")


def _roof(recorder: Recorder, shapes: Shapes, rates: Rates, context: int, window: int) -> None:
    """One row of the roof: the slower of moving and computing."""
    dtype = getattr(torch, shapes.dtype)
    cost = cost_of(shapes.config, context, window, dtype)
    recorder.row(
        "roof of one guided pass",
        context=context,
        window=window,
        gigabytes=cost.num_bytes / 1e9,
        teraflop=cost.flop / 1e12,
        moving_ms=Cost(cost.num_bytes, 0.0).floor_ms(rates),
        computing_ms=Cost(0.0, cost.flop).floor_ms(rates),
        roof_ms=cost.floor_ms(rates),
        tokens_per_ms=window / cost.floor_ms(rates),
    )


def _latencies(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """What the host costs: giving the device one small operation, and reading one number back."""
    small = random_tensor(64, device=device)
    launch = time_calls(
        lambda: small.add_(1.0), device, samples=shapes.samples, calls=SMALL_LAUNCHES
    )
    recorder.figure(
        "one small operation", 1e6 * launch.median, "us", note=f"{SMALL_LAUNCHES} in a row"
    )
    look = time_calls(
        lambda: float(small.add_(1.0)[0]), device, samples=shapes.samples, calls=SMALL_LAUNCHES
    )
    recorder.figure("the same, and a look at its result", 1e6 * look.median, "us")


def _attention_kernels(recorder: Recorder, device: torch.device) -> None:
    """Which attention this build of torch can take here for the shapes of a pass, by dtype."""
    if device.type != "cuda":
        recorder.missing("attention kernels", "there is one kernel on a CPU")
        return
    from torch.backends.cuda import (
        SDPAParams,
        can_use_efficient_attention,
        can_use_flash_attention,
    )

    for dtype in (torch.bfloat16, torch.float32):
        q = random_tensor(2, 64, 128, 64, device=device, dtype=dtype)
        k = random_tensor(2, 64, 4096, 64, device=device, dtype=dtype)
        asked = SDPAParams(q, k, k, None, 0.0, False, False)
        recorder.row(
            "attention of the last places of a sequence",
            dtype=str(dtype).removeprefix("torch."),
            flash=can_use_flash_attention(asked),
            efficient=can_use_efficient_attention(asked),
        )
