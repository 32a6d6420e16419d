"""Block size and threshold of block Jacobi against time and error (paper, Fig. 3).

    python -m benchmarks.experiments.jacobi [--model FOLDER]

Each video is solved from the same noise token by token, in blocks of several sizes with several
thresholds, and by the sliding window. The error is that of the deep block's tokens, root mean
square over the exact ones'. Times are medians over videos, taken in turns.

Knows schedules. Knows nothing of decoding.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.page import SEED, Subject, run, save_plot, table
from flow.sampling import DeepStream, frame_noise
from pipeline.evaluation import scenes
from pipeline.evaluation.samples import Sampling, encode, noise_shape, spec_of

VIDEOS = 6
BLOCKS = (2, 4, 8, 16)
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Squared change of a sweep over squared tokens at which a block is solved."""


@torch.no_grad()
def solved(
    subject: Subject, text: str, seed: int, changes: dict[str, Any]
) -> tuple[Any, float, float]:
    """Tokens of one video, seconds, and evaluations for each token."""
    loaded = subject.loaded
    frames = loaded.facts.num_frames
    texts = encode(loaded, [text], frames)
    spec = dataclasses.replace(
        spec_of(loaded, Sampling(subject.guidance, seed=seed), frames), **changes
    )
    stream = DeepStream(
        loaded.model.flow, texts.text_BJE, texts.null_BJE, spec,
        noise=lambda n: frame_noise(seed, n, noise_shape(loaded))[None],
    )  # fmt: skip
    begun = time.perf_counter()
    tokens = torch.cat([stream.next_frame() for _ in range(spec.num_frames)], dim=1)
    took = time.perf_counter() - begun
    return tokens, took, stream.counters.evaluations_per_token


def experiment(subject: Subject, pages: Path) -> str:
    """The table and the plot."""
    from matplotlib import pyplot

    loaded = subject.loaded
    texts = scenes.asked(VIDEOS, "seen", SEED, subject.recipe.world.kinds, loaded.facts).texts
    ways: dict[str, dict[str, Any]] = {
        "sequential": {"schedule": "sequential", "tolerance": 0.0},
        "sliding window (default)": {"schedule": "sliding"},
    }
    for block in BLOCKS:
        for threshold in THRESHOLDS:
            ways[f"{block} tokens, {threshold:.0e}"] = {
                "schedule": "jacobi", "block_size": block, "later_block_factor": 1,
                "tolerance": threshold,
            }  # fmt: skip
    solved(subject, texts[0], SEED, ways["sequential"])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, list[float]] = {name: [] for name in ways}
    passes: dict[str, list[float]] = {name: [] for name in ways}
    for number, text in enumerate(texts):
        truth = None
        for name, changes in ways.items():
            tokens, took, evaluations = solved(subject, text, SEED + number, changes)
            truth = tokens if truth is None else truth
            seconds[name].append(took)
            errors[name].append(float((tokens - truth).norm() / truth.norm()))
            passes[name].append(evaluations)
    slow = statistics.median(seconds["sequential"])
    rows = [
        [
            name, f"{slow / statistics.median(seconds[name]):.2f}",
            f"{statistics.mean(passes[name]):.2f}", f"{statistics.mean(errors[name]):.1e}",
            f"{max(errors[name]):.1e}",
        ]
        for name in ways
    ]  # fmt: skip
    figure, axis = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    gains = {name: slow / statistics.median(seconds[name]) for name in ways}
    means = {name: statistics.mean(errors[name]) for name in ways}
    for block in BLOCKS:
        names = [f"{block} tokens, {threshold:.0e}" for threshold in THRESHOLDS]
        xy = [means[n] for n in names], [gains[n] for n in names]
        axis.plot(*xy, marker="o", label=f"{block} tokens")
    window = "sliding window (default)"
    axis.plot(means[window], gains[window], "k*", label=window)
    axis.set_xscale("log")
    axis.set_xlabel("relative error of the tokens")
    axis.set_ylabel("times as fast as sequential")
    axis.legend(fontsize=8)
    columns = [
        "blocks, threshold", "times as fast as sequential", "evaluations a token", "mean error",
        "largest error",
    ]  # fmt: skip
    about = f"{VIDEOS} videos, guidance {subject.guidance:g}, one token a step in *sequential*."
    return f"{table(columns, rows)}\n\n{about}\n\n{save_plot(figure, 'jacobi', pages)}"


if __name__ == "__main__":
    run(experiment, "jacobi", __doc__ or "")
