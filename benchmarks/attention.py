"""Attention of the last places over a cache, whole and split, on a GPU.

    python -m benchmarks.attention

Split: the past without a mask, by cuDNN, and the rest with the causal rule, by flash attention,
merged by their log-sum-exps. The past is cut at a multiple of PAST_STEP places, because cuDNN plans
anew for every length. Prints microseconds a layer, as a CUDA graph, for the heads of the 7B and the
two branches of guidance; beside them the error of both ways against float64, and what a plan costs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.device import time_calls
from benchmarks.gpu.one_pass import capture
from flow.attention import attend_last

BATCH, HEADS, DIM = 2, 64, 64
CONTEXTS, WINDOWS = (2300, 17000, 33000), (32, 64, 128, 256, 512)
PAST_STEP = 2048
CALLS = 20
CHECKED_HEADS = 4


def attend_split(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, past: int) -> Tensor:
    """What `attend_last` gives, from the first `past` places and the others apart."""
    aten = torch.ops.aten
    dense = aten._scaled_dot_product_cudnn_attention(
        q_BHLD, k_BHSD[:, :, :past], v_BHSD[:, :, :past], None, True, 0.0, False, False
    )
    # Flash attention's causal rule ends at the last key, whatever the number of queries.
    recent = aten._scaled_dot_product_flash_attention(
        q_BHLD, k_BHSD[:, :, past:], v_BHSD[:, :, past:], 0.0, True, False
    )
    weights = [out[1].reshape(q_BHLD.shape[:3]) for out in (dense, recent)]
    share = torch.sigmoid(weights[0] - weights[1]).unsqueeze(-1)
    return torch.lerp(recent[0].float(), dense[0].float(), share).to(q_BHLD.dtype)


def exact(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """A few heads in float64."""
    q, k, v = (x[:1, :CHECKED_HEADS].double() for x in (q_BHLD, k_BHSD, v_BHSD))
    length, places = q.shape[2], k.shape[2]
    hidden = torch.ones(length, places, dtype=torch.bool, device=q.device)
    scores = (q @ k.mT * DIM**-0.5).masked_fill(hidden.triu(places - length + 1), -torch.inf)
    return scores.softmax(-1) @ v


def repeat(way: Callable[[], Tensor]) -> None:
    """A sample's calls, captured together: a replay of one would take as long as its launch."""
    for _ in range(CALLS):
        way()


def measure(context: int, window: int, cache_2BHSD: Tensor) -> str:
    """A line of the table."""
    device = cache_2BHSD.device
    q = torch.randn(BATCH, window, HEADS, DIM, device=device, dtype=cache_2BHSD.dtype)
    q = q.transpose(1, 2)
    k, v = cache_2BHSD[:, :, :, : context + window]
    past = context // PAST_STEP * PAST_STEP
    ways: list[Callable[[], Tensor]] = [
        lambda: attend_last(q, k, v),
        lambda: attend_split(q, k, v, past),
    ]
    right = exact(q, k, v)
    cells = []
    for way in ways:
        out = way()[:1, :CHECKED_HEADS].double()
        error = float((out - right).norm() / right.norm())
        replay = capture(functools.partial(repeat, way)).replay
        times = time_calls(replay, device, samples=5)
        cells.append(f"{1e3 * times.ms / CALLS:9.0f} us {error:9.1e}")
    return f"{context:7} {window:7} " + " ".join(cells)


def main() -> int:
    """Print the table; 2 where there is no CUDA device."""
    if not torch.cuda.is_available():
        print("there is no CUDA device here, and nothing else has these kernels")
        return 2
    device = torch.device("cuda")
    places = max(CONTEXTS) + max(WINDOWS)
    cache = torch.randn(2, BATCH, HEADS, places, DIM, device=device, dtype=torch.bfloat16)
    print("context  window        whole  rms error        split  rms error")
    with torch.inference_mode():
        for context in CONTEXTS:
            for window in WINDOWS:
                print(measure(context, window, cache), flush=True)
        q = torch.randn(BATCH, HEADS, 128, DIM, device=device, dtype=torch.bfloat16)
        began = time.perf_counter()
        for length in range(9000, 9010):
            k, v = cache[:, :, :, : length + 128]
            attend_split(q, k, v, past=length)
        torch.cuda.synchronize()
        print(f"a new length of the past: {100 * (time.perf_counter() - began):.0f} ms to plan")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
