"""How fast and how exact the deep block's samplers are, on trained weights, in one run.

    python -m benchmarks.sampling [--model DIR] [--rounds 5] [--threads N] [--out runs/benchmarks]

Every sampler makes the same videos, in turn, `--rounds` times. Times are medians; ratios are of
this run. Each stands beside its error against the exact inverse and its certificate. By default the
model is the one in the repository (`tests/fixtures/trained_small`).

Knows what `benchmarks.sampling_case` compares. Knows nothing of Ray or diffusers.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.sampling_case import GUIDANCE, TRAINED, Case, Sampler, load_case, samplers
from benchmarks.sampling_figures import draw
from flow.certificate import certificate


@dataclass(frozen=True)
class Bar:
    """What the default schedule must reach, means over the videos.

    Source: the README of `tests/fixtures/trained_small`.
    """

    rms: float = 2.5e-2
    max_abs: float = 0.35
    iterations: float = 70.0
    evaluations: float = 4.0
    over_jacobi: float = 1.7
    over_sequential: float = 5.0


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the videos, medians over the rounds."""

    name: str
    iterations: float
    evaluations: float
    """Per token."""
    wall_s: float
    cpu_s: float
    rms: float
    """Of the error, over that of the exact video."""
    max_abs: float
    """Of the error."""
    r_max: float
    """Of the certificate, over all videos."""
    r_p999: float


def measure(case: Case, samplers: Iterable[Sampler], rounds: int) -> list[Row]:
    """Run all samplers in turn on each video, `rounds` times after one to warm up.

    The median of a video's rounds counts. In turn, so that what else the machine does falls on all
    samplers alike.
    """
    samplers = [*samplers]
    for index in range(rounds + 1):
        for row in range(case.videos):
            for sampler in samplers:
                wall, cpu = time.perf_counter(), time.process_time()
                sampler.run(case, row)
                if index:
                    sampler.wall_s[row].append(time.perf_counter() - wall)
                    sampler.cpu_s[row].append(time.process_time() - cpu)
    return [_row(case, sampler) for sampler in samplers]


def _row(case: Case, sampler: Sampler) -> Row:
    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    rows = range(case.videos)
    errors = [sampler.videos[i] - case.exact[i : i + 1] for i in rows]
    proofs = [
        certificate(
            case.flow,
            sampler.videos[i],
            case.text[i : i + 1],
            case.null[i : i + 1],
            case.spec(sampler.changes),
            noise=lambda n, i=i: case.noise[i : i + 1, n],  # type: ignore[misc]
        )
        for i in rows
    ]
    return Row(
        sampler.name,
        mean(sampler.counters[i].iterations for i in rows),
        mean(sampler.counters[i].token_evaluations / case.tokens for i in rows),
        mean(statistics.median(times) for times in sampler.wall_s.values()),
        mean(statistics.median(times) for times in sampler.cpu_s.values()),
        mean(float(errors[i].norm() / case.exact[i].norm()) for i in rows),
        mean(float(error.abs().max()) for error in errors),
        max(proof.max_abs for proof in proofs),
        max(proof.p999_abs for proof in proofs),
    )


def table(rows: list[Row], default: Row) -> list[str]:
    """The table as lines; times of others as multiples of the default's."""
    head = (
        f"{'schedule':<34}{'iterations':>11}{'eval/token':>11}{'seconds':>9}{'ratio':>7}"
        f"{'cpu s':>8}{'ratio':>7}{'rel rms':>10}{'max abs':>9}{'max |r|':>9}{'p99.9 |r|':>11}"
    )
    lines = [head]
    for row in rows:
        lines.append(
            f"{row.name:<34}{row.iterations:>11.1f}{row.evaluations:>11.2f}{row.wall_s:>9.3f}"
            f"{row.wall_s / default.wall_s:>7.2f}{row.cpu_s:>8.3f}{row.cpu_s / default.cpu_s:>7.2f}"
            f"{row.rms:>10.2e}{row.max_abs:>9.3f}{row.r_max:>9.3f}{row.r_p999:>11.4f}"
        )
    return lines


def verdicts(default: Row, jacobi: Row, sequential: Row, bar: Bar) -> list[tuple[str, bool]]:
    """Every condition of the bar in words, and whether it holds."""

    def at_most(what: str, value: float, limit: float) -> tuple[str, bool]:
        return f"{what} {value:.4g} <= {limit:g}", value <= limit

    def at_least(what: str, value: float, limit: float) -> tuple[str, bool]:
        return f"{what} {value:.2f} >= {limit:g}", value >= limit

    return [
        at_most("relative rms error", default.rms, bar.rms),
        at_most("max abs error", default.max_abs, bar.max_abs),
        at_most("iterations", default.iterations, bar.iterations),
        at_most("evaluations per token", default.evaluations, bar.evaluations),
        at_least("times faster than jacobi 64", jacobi.wall_s / default.wall_s, bar.over_jacobi),
        at_least(
            "times faster than sequential", sequential.wall_s / default.wall_s, bar.over_sequential
        ),
    ]


PRODUCTS_S = 0.57
"""Seconds of 50 products of 1024x1024 matrices where the reference sampler was timed."""
REFERENCE_S = {"sequential": (1.6, 1.6), "block Jacobi 64, 1e-3": (0.31, 0.39)}
"""Least and most seconds that the reference sampler took there for one video.

Source of both: the README of `tests/fixtures/trained_small`.
"""


def against_reference(default: Row, rounds: int) -> list[str]:
    """The default against the reference's times, scaled by how fast this machine multiplies."""
    a, b = torch.randn(2, 1024, 1024).unbind()
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(50):
            torch.mm(a, b)
        times.append(time.perf_counter() - began)
    here = statistics.median(times[1:])
    lines = [
        f"50 products of 1024x1024 matrices take {here:.2f} s here, "
        f"{PRODUCTS_S:.2f} s where the reference was timed;"
    ]
    for name, seconds in REFERENCE_S.items():
        least, most = (value * here / PRODUCTS_S / default.wall_s for value in seconds)
        times_faster = f"{least:.1f}" if least == most else f"{least:.1f} to {most:.1f}"
        lines.append(f"by that measure {times_faster} times faster than the reference's {name}")
    return lines


def machine() -> str:
    """Where this ran."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load"
        f" {load:.1f}, torch {torch.__version__}, float32"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the verdicts and draw the figures; 0 where the bar is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks.sampling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", type=Path, default=TRAINED, help="a folder like tests/fixtures/trained_small"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of every sampler")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: as torch chooses")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where PNGs go")
    parser.add_argument("--no-figures", action="store_true", help="table only")
    options = parser.parse_args(arguments)
    if not (options.model / "case.safetensors").exists():
        parser.error(f"--model {options.model}: no case.safetensors there; a speed needs weights")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    case = load_case(options.model)
    print(
        f"{options.model.resolve().name}: {case.videos} videos of {case.tokens} tokens, one by one,"
    )
    print(f"guidance {GUIDANCE}, deep block only; {machine()}")
    rows = measure(case, samplers(case), options.rounds)
    print(*table(rows, rows[0]), sep="\n")
    by_name = {row.name: row for row in rows}
    checks = verdicts(rows[0], by_name["jacobi 64, 1e-3"], by_name["sequential"], Bar())
    for words, holds in checks:
        print(f"{'met    ' if holds else 'NOT MET'}  {words}")
    met = all(holds for _, holds in checks)
    print("The bar is met." if met else "The bar is NOT met.")
    print(*against_reference(rows[0], options.rounds), sep="\n")
    if not options.no_figures:
        for path in draw(case, options.out):
            print(f"wrote {path}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
