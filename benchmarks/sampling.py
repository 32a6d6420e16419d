"""How fast and how exact the deep block's samplers are, on trained weights, in one run.

    python -m benchmarks.sampling [--model DIR] [--rounds 5] [--threads N] [--out runs/benchmarks]

Every sampler makes the same videos, in turn, `--rounds` times; times are medians, ratios are of this run. Each
stands beside its error against the exact inverse and its certificate. Knows the samplers and one directory with
`weights.pth`, `config.yaml` and `case.safetensors`; needs neither Ray nor diffusers.

Shapes: B batch, L tokens of a video, C numbers per token.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flow.certificate import certificate
from flow.counters import Counters
from flow.flow import DeepShallowFlow
from flow.inverse import Inverter
from flow.packed_weights import can_pack
from flow.released_checkpoint import import_released
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream
from flow.tokens import frame_sequence, patchify

GUIDANCE = 2.5
TRAINED = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "trained_small"
BLOCKS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Bar:
    """What the default schedule must reach (the README of `trained_small`), means over the videos."""

    rms: float = 2.5e-2
    max_abs: float = 0.35
    iterations: float = 70.0
    evaluations: float = 4.0
    over_jacobi: float = 1.7
    over_sequential: float = 5.0


@dataclass
class Case:
    """The model, and the videos every sampler makes."""

    flow: DeepShallowFlow
    text: Tensor
    null: Tensor
    noise: Tensor
    exact: Tensor

    @property
    def videos(self) -> int:
        """Number of videos."""
        return len(self.noise)

    @property
    def tokens(self) -> int:
        """Tokens of one video."""
        return self.exact[0, ..., 0].numel()

    def spec(self, changes: dict[str, Any]) -> SampleSpec:
        """The specification of a video, with the fields of a sampler."""
        frames, _, h, w = self.noise.shape[1:]
        return SampleSpec(num_frames=frames, grid=(h, w), guidance=GUIDANCE, **changes)


def load_case(directory: Path) -> Case:
    """Read a directory in the layout of `trained_small`."""
    model, _ = import_released(directory / "weights.pth", directory / "config.yaml")
    case = load_file(directory / "case.safetensors")
    return Case(
        model.eval().flow, case["text"], case["text_null"], case["noise"], case["deep_guided"]
    )


@dataclass
class Sampler:
    """A way to sample, and what was measured. `packed`: True gives Jacobi the packed weights that only the sliding
    window takes by itself, False takes them from it, None leaves each as it is."""

    name: str
    changes: dict[str, Any]
    packed: bool | None = None
    wall_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    videos: dict[int, Tensor] = field(default_factory=dict)
    counters: dict[int, Counters] = field(default_factory=dict)

    def run(self, case: Case, row: int) -> None:
        """Make one video and keep it; the caller keeps the time."""
        part = slice(row, row + 1)
        stream = DeepStream(
            case.flow,
            case.text[part],
            case.null[part],
            case.spec(self.changes),
            noise=lambda n: case.noise[part, n],
        )
        inverter = stream.inverter
        if self.packed is not None:
            inverter.use_packed(64 if self.packed else 0)
        self.videos[row] = torch.cat(
            [stream.next_frame() for _ in range(stream.spec.num_frames)], 1
        )
        self.counters[row] = stream.counters


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the videos, medians over the rounds."""

    name: str
    iterations: float
    evaluations: float
    wall_s: float
    cpu_s: float
    rms: float
    max_abs: float
    r_max: float
    r_p999: float


def measure(case: Case, samplers: Iterable[Sampler], rounds: int) -> list[Row]:
    """Run all samplers in turn on each video, `rounds` times after one to warm up.

    Of every video the median of the rounds counts: what else the machine does then falls on all samplers alike.
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
        f"{'schedule':<34}{'iterations':>11}{'eval/token':>11}{'seconds':>9}{'ratio':>7}{'cpu s':>8}"
        f"{'ratio':>7}{'rel rms':>10}{'max abs':>9}{'max |r|':>9}{'p99.9 |r|':>11}"
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


PRODUCTS_S, REFERENCE_S = 0.57, {"sequential": (1.6, 1.6), "block Jacobi 64, 1e-3": (0.31, 0.39)}
"""What the README of `trained_small` says of the machine and of the reference sampler there: seconds of 50 products, and
the least and most seconds for one video."""


def against_reference(default: Row, rounds: int) -> list[str]:
    """The default against the reference sampler's own times, which are scaled by how fast this machine multiplies."""
    a, b = torch.randn(2, 1024, 1024).unbind()
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(50):
            torch.mm(a, b)
        times.append(time.perf_counter() - began)
    here = statistics.median(times[1:])
    lines = [
        f"50 products of 1024x1024 matrices take {here:.2f} s here, {PRODUCTS_S:.2f} s where the reference was timed;"
    ]
    for name, seconds in REFERENCE_S.items():
        least, most = (value * here / PRODUCTS_S / default.wall_s for value in seconds)
        times_faster = f"{least:.1f}" if least == most else f"{least:.1f} to {most:.1f}"
        lines.append(f"by that measure {times_faster} times faster than the reference's {name}")
    return lines


def _inverter(case: Case) -> tuple[Inverter, Tensor, int]:
    """An inverter of the first video, its noise [1, L, C] in the block's order, and tokens per frame."""
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

    The first frame is known and exact; start values repeat its mu and sigma in every frame of the block.
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
    """Seconds for the first video in blocks of this many tokens, across frames where they are longer."""
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


def machine() -> str:
    """Where this ran."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load"
        f" {load:.1f}, torch {torch.__version__}, float32"
    )


def samplers(case: Case) -> list[Sampler]:
    """What is compared: the default, the two it is held against, and others."""
    jacobi = {"schedule": "jacobi", "block_size": 64, "tolerance": 1e-3}
    rows = [
        Sampler(f"default ({SampleSpec.schedule})", {}),
        Sampler("sequential", {"schedule": "sequential"}),
        Sampler("jacobi 64, 1e-3", jacobi),
        Sampler("jacobi 16 then 64, 1e-3", {**jacobi, "block_size": 16}),
        Sampler("sliding, r <= 0.01", {"token_tolerance": 0.01, "cold_token_tolerance": 0.01}),
    ]
    if can_pack(case.flow.deep):
        rows.insert(3, Sampler("jacobi 64, 1e-3, packed weights", jacobi, packed=True))
        rows.append(Sampler("sliding, plain weights", {"schedule": "sliding"}, packed=False))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the verdicts, draw the figures; 0 where the bar is met, 1 where it is not."""
    parser = argparse.ArgumentParser(prog="benchmarks.sampling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", type=Path, default=TRAINED, help="a directory like trained_small"
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
