"""What a training step costs in fp32 and in bf16, and what torch's attention costs with gradients.

    python -m benchmarks.training_step [--recipe tiny] [--rounds 7]

Latents and text are random: the time of a step does not depend on them. Beside the speed stands how
far the gradients of bf16 are from those of fp32, as the length of their difference over theirs.

Knows the training step of one process. Knows nothing of Ray.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flow.attention import attend
from flow.codec_factors import read_factors
from flow.device import device_of, has_quick_bf16
from pipeline.recipes import Recipe, load_recipe
from training.data.batch_sampler import Mode
from training.data.batches import TrainBatch
from training.parallel import Parallel
from training.step import TrainStep
from training.weights import fresh_model

LENGTHS = (16, 104, 344)
"""Places of a sequence: a frame, five frames with text, seventeen."""


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median time of a call, the first one left out."""
    took = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        call()
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def random_batch(recipe: Recipe, frames: int, size: int, device: torch.device) -> TrainBatch:
    """Noise in the shape of `size` clips of so many latent frames."""
    bucket, flow = recipe.prepare.bucket, recipe.model
    generator = torch.Generator().manual_seed(frames)
    grid = read_factors(recipe.codec_source).grid(bucket.height, bucket.width)
    shape = (size, frames, flow.latent_channels, *grid)
    text = (size, flow.text_len, flow.text_dim)
    noisy, words = torch.randn(shape, generator=generator), torch.randn(text, generator=generator)
    mode: Mode = "video" if frames > 1 else "image"
    return TrainBatch(noisy, words, ["x"] * size, mode).to(device)


def step_times(recipe: Recipe, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of a step by precision and kind of batch."""
    batches = recipe.train.batches
    kinds = {
        "clips": random_batch(recipe, 5, batches.batch_size, device),
        "images": random_batch(recipe, 1, batches.image_batch_size, device),
    }
    times: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "bf16"):
        config = recipe.train.model_copy(update={"precision": precision})
        model = fresh_model(recipe.model, 0).to(device)
        step = TrainStep(model, config, Parallel(0, 1, device, None))
        times[precision] = {
            kind: seconds(lambda step=step, batch=batch: step.take(0, batch), rounds)  # type: ignore[misc]
            for kind, batch in kinds.items()
        }
    return times


def gradient_error(recipe: Recipe, device: torch.device) -> float:
    """Length of the difference of bf16's gradient and fp32's, over that of fp32's."""
    batch = random_batch(recipe, 5, 4, device)
    gradients = []
    for precision in ("fp32", "bf16"):
        model = fresh_model(recipe.model, 0).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model.flow(batch.x_noisy, batch.text_BJE).loss()
        loss.backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.flow.parameters() if p.grad is not None])
        )
    exact, rounded = gradients
    return float((rounded - exact).norm() / exact.norm())


def attention_times(length: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of causal attention with its gradients, by how it is computed."""
    shape = (16, 6, length, 32)

    def timed(dtype: torch.dtype, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        q, k, v = (
            torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in range(3)
        )

        def call() -> None:
            function(q, k, v).sum().backward()

        return seconds(call, rounds)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {
        "fp32": timed(torch.float32, plain),
        "bf16, torch's": timed(torch.bfloat16, plain),
        "bf16, ours": timed(torch.bfloat16, lambda q, k, v: attend(q, k, v, is_causal=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", default="tiny", help="recipe that gives the model and batches")
    parser.add_argument("--rounds", type=int, default=7, help="times each figure is taken")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, recipe = device_of(), load_recipe(arguments.recipe)
    print(f"{device}, one thread; bf16 by its own instructions: {has_quick_bf16(device)}")
    times = step_times(recipe, arguments.rounds, device)
    for kind in ("clips", "images"):
        fp32, bf16 = times["fp32"][kind], times["bf16"][kind]
        print(
            f"step of {kind}: fp32 {fp32:.3f} s, bf16 {bf16:.3f} s, {fp32 / bf16:.2f} times as fast"
        )
    print(f"gradients of bf16 are off by {gradient_error(recipe, device):.4f} of their length")
    for length in LENGTHS:
        row = attention_times(length, arguments.rounds, device)
        figures = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in row.items())
        print(f"attention over {length} places, with gradients: {figures}")


if __name__ == "__main__":
    main()
