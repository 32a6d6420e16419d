"""What the pipeline costs beside its work: `prepare` on Ray against bare loops of the same calls.

    python -m benchmarks.prepare [--cpus N] [--bucket 17x192x320] [--clips 256] [--no-memory]
    python -m benchmarks.prepare --feeder [--device cuda] [--codec DIR]
    python -m benchmarks.prepare --scale [--clips 192] [--store-shards 10000]

N loops at once, a thread each, decode and encode clips for a while; then the pipeline prepares the
same clips; then the loops run again. The ratio is the pipeline's clips per second over the mean of
the loops' sums, in one run on one machine. Start-up (Ray, the imports of its workers, loading the
codec) is not in it: the pipeline is timed from its first finished sample to its last. Then shards
and ten times as many are prepared, for the peak of memory: the sum of proportional set sizes over
all processes of a run.

`--feeder` (`benchmarks/feeder.py`) says how busy decoders keep one encoder, `--scale`
(`benchmarks/sinks.py`) how fast sinks write; both without Ray. Ray runs in a process of its own
(`benchmarks/on_ray.py`); this file knows nothing of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import sinks
from benchmarks.clips import bucket_sizes, rows_of_shard, write_clips
from benchmarks.feeder import BUSY_BAR, feeder
from benchmarks.processes import OTHERS, Watch, cpu_seconds, machine_seconds
from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.records import Bucket

ROOT = Path(__file__).resolve().parents[1]
TINY_CODEC = ROOT / "pipeline" / "assets" / "tiny_codec"
BAR = 0.9
"""The pipeline must reach this share of the loops' speed."""
MEMORY_BAR = 1.1
"""Ten times the shards may take this many times the memory."""
FEEDER_CLIPS = 2
"""Rendered for the feeder, which takes them over and over; at 720p one takes ten seconds."""
QUIET = 0.1
"""CPUs that other programs may take in any of the three parts; with more, the ratio is void."""


def bare_loop(
    config: PrepareConfig, shards: list[str], codec: str, seconds: float
) -> tuple[int, float, float]:
    """What one thread decodes and encodes from a time of the monotonic clock on.

    Says `ready` when it has loaded everything, then reads that time from its standard input.
    Returns clips, seconds and CPU seconds.
    """
    from data_prep.clips.decode import DecodeStage
    from data_prep.latents.encode import EncodeStage

    rows = [row for shard in shards for row in rows_of_shard(shard, config)]
    decode = DecodeStage(config, bucket_sizes(config, codec))
    encode = EncodeStage(config, codec, frozenset())
    encode.process(decode.process(rows[0]))
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    time.sleep(max(0.0, start - time.monotonic()))
    began_s, cpu_s, clips = time.monotonic(), cpu_seconds(os.getpid()), 0
    while not clips or time.monotonic() < start + seconds:
        encode.process(decode.process(rows[clips % len(rows)]))
        clips += 1
    figures = clips, time.monotonic() - began_s, cpu_seconds(os.getpid()) - cpu_s
    decode.close()
    return figures


def bare_rate(
    config: PrepareConfig, shards: list[str], codec: str, cpus: int, seconds: float
) -> tuple[float, float]:
    """Clips per second of `cpus` loops at once, added up; and CPUs that other programs took."""
    arguments = [config.model_dump_json(), codec, str(seconds), *shards]
    command = [sys.executable, "-m", "benchmarks.prepare", "--loop", *arguments]
    loops = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(cpus)
    ]
    # They begin together when the slowest is loaded, however busy the machine is.
    ready = [loop.stdout.readline() == "ready\n" for loop in loops if loop.stdout]
    start = time.monotonic() + 0.5
    if not all(ready):
        for loop in loops:
            loop.kill()
        raise RuntimeError("a bare loop failed before it began; its message is above")
    for loop in loops:
        assert loop.stdin is not None
        loop.stdin.write(f"{start}\n")
        loop.stdin.flush()
    time.sleep(max(0.0, start - time.monotonic()))
    before, _ = machine_seconds()
    time.sleep(max(0.0, start + seconds - time.monotonic()))
    after, _ = machine_seconds()
    figures = [json.loads(loop.communicate()[0] or "null") for loop in loops]
    if any(loop.returncode for loop in loops):
        raise RuntimeError("a bare loop failed; its message is above")
    ours = sum(cpu_s / took_s for _, took_s, cpu_s in figures)
    return sum(n / took_s for n, took_s, _ in figures), max(0.0, (after - before) / seconds - ours)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass
class PipelineRun:
    """What one run of the pipeline measured."""

    figures: dict[str, Any]
    peak_bytes: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU seconds by process title between the first and the last sample."""

    @property
    def clips_per_s(self) -> float:
        """From the first finished sample's block to the last sample."""
        times = self.figures["times"]
        # The first block's samples all come at once: they are start-up, not work.
        first = sum(t <= times[0] + 0.05 for t in times)
        took_s = times[-1] - times[0]
        return (len(times) - first) / took_s if took_s > 0 else 0.0

    @property
    def working_s(self) -> float:
        """From the first finished sample to the last."""
        return float(self.figures["times"][-1] - self.figures["times"][0])

    @property
    def bottleneck(self) -> str:
        """The stage whose workers were busiest."""
        return str(max(self.figures["stages"], key=lambda s: s["utilisation"])["name"])


def run_pipeline(
    config: PrepareConfig,
    shards: list[str],
    codec: str,
    cpus: int,
    out: Path,
    *,
    memory: bool = False,
) -> PipelineRun:
    """`prepare` in a process of its own, on a Ray of its own, watched from outside."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.on_ray", config.model_dump_json(), str(out), codec]
    with subprocess.Popen(
        [*command, str(cpus), *shards],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        watch = Watch(process.pid, memory=memory)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            if line.startswith(("STARTED", "ENDED")):
                watch.mark()
            lines.append(line)
        watch.stop()
    if process.returncode or not lines:
        raise RuntimeError(f"the pipeline failed: {' '.join(command)} … {' '.join(shards[:3])}")
    return PipelineRun(json.loads(lines[-1]), watch.peak_bytes, watch.cpu_s())


def compare(options: argparse.Namespace, config: PrepareConfig, scratch: Path) -> dict[str, Any]:
    """Loops, pipeline, loops; then the pipeline on some shards and on ten times as many."""
    source = options.source
    shards = options.shards or write_clips(
        scratch / "in",
        options.clips,
        options.per_shard,
        source,
        config.bucket.num_frames,
        config.bucket.fps,
    )
    cpus, codec = options.cpus, str(options.codec)
    seconds = options.seconds / 2
    before, others_before = bare_rate(config, shards, codec, cpus, seconds)
    run = run_pipeline(config, shards, codec, cpus, scratch / "out")
    after, others_after = bare_rate(config, shards, codec, cpus, seconds)
    others = [others_before, run.cpu_s[OTHERS] / run.working_s, others_after]
    bare = (before + after) / 2
    rates = zip((before, run.clips_per_s, after), others, strict=True)
    free = [rate / (cpus - taken) for rate, taken in rates]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {cpus} used",
        "bucket": options.bucket,
        "source": f"{source[0]}x{source[1]}",
        "clips": len(run.figures["times"]),
        "bare_clips_per_s": [before, after],
        "pipeline_clips_per_s": run.clips_per_s,
        "ratio": run.clips_per_s / bare,
        "startup_s": run.figures["startup_s"],
        "bottleneck": run.bottleneck,
        "stages": run.figures["stages"],
        "cpu_s": run.cpu_s,
        "working_s": run.working_s,
        "others_cpus": others,
        "ratio_per_free_cpu": free[1] / ((free[0] + free[2]) / 2),
    }
    if options.memory:
        result |= memory(options, scratch)
    return result


def memory(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Peaks of memory on a few shards of small clips, and on ten times as many."""
    config = PrepareConfig(bucket=BucketConfig())
    few = write_clips(scratch / "few", 8 * 32, 32, (64, 64), 17, 8.0)
    many = write_clips(scratch / "many", 80 * 32, 32, (64, 64), 17, 8.0)
    peaks = []
    for shards in (few, many):
        codec, out = str(options.codec), scratch / "out"
        run = run_pipeline(config, shards, codec, options.cpus, out, memory=True)
        assert run.figures["counts"] == {"kept": 32 * len(shards)}
        peaks.append(run.peak_bytes)
    return {
        "shards": [len(few), len(many)],
        "peak_bytes": peaks,
        "memory_ratio": peaks[1] / peaks[0],
    }


def verdicts(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each bar and whether it is met."""
    disturbed = max(result["others_cpus"])
    met = [(f"other programs took at most {QUIET} of a CPU: {disturbed:.2f}", disturbed <= QUIET)]
    met += [
        (f"pipeline at least {BAR} of the loops: {result['ratio']:.3f}", result["ratio"] >= BAR)
    ]
    if "memory_ratio" in result:
        few, many = result["shards"]
        words = f"peak memory on {many} shards at most {MEMORY_BAR} of that on {few}"
        words += f": {result['memory_ratio']:.3f}"
        met.append((words, result["memory_ratio"] <= MEMORY_BAR))
    return met


def show(result: dict[str, Any]) -> None:
    """The tables."""
    before, after = result["bare_clips_per_s"]
    clips = f"{result['clips']} clips of {result['source']} to {result['bucket']}"
    print(f"{result['machine']}; {clips}")
    print(f"bare loops, added up    {before:8.2f} clips/s before, {after:.2f} after")
    print(
        f"pipeline                {result['pipeline_clips_per_s']:8.2f} clips/s, "
        f"{result['ratio']:.3f} of the loops; start-up of {result['startup_s']:.1f} s not counted"
    )
    head = f"{'stage':10} workers  busy    s busy     clips      MB out"
    print(f"\n{head}   bottleneck: {result['bottleneck']}")
    for stage in result["stages"]:
        print(
            f"{stage['name']:10} {stage['workers']:7} {stage['utilisation']:5.0%} "
            f"{stage['busy_s']:9.2f} {stage['rows']:9} {stage['bytes_out'] / 1e6:11.1f}"
        )
    taken = ", ".join(f"{cpus:.2f}" for cpus in result["others_cpus"])
    print(
        f"\nratio per CPU that other programs left: {result['ratio_per_free_cpu']:.3f} "
        f"(before, in and after the pipeline they took {taken} of one)"
    )
    cpus_used = result["machine"].split(", ")[-1]
    print(f"\nCPU seconds of the {result['working_s']:.1f} s after start-up (all {cpus_used})")
    for title, seconds in result["cpu_s"].items():
        print(f"  {title:16} {seconds:8.2f}  {seconds / result['working_s']:6.1%} of a CPU")
    for count, peak in zip(result.get("shards", ()), result.get("peak_bytes", ()), strict=True):
        print(f"peak memory, {count:4} shards  {peak / 2**20:8.0f} MiB")
    for words, holds in verdicts(result):
        print(f"{'met    ' if holds else 'NOT MET'} {words}")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.prepare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="loops, and CPUs of Ray")
    parser.add_argument("--bucket", default="17x192x320", help="frames x height x width")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second of a clip")
    parser.add_argument(
        "--source", default="360x640", help="height x width of the clips that are made"
    )
    parser.add_argument("--clips", type=int, default=192, help="clips through the pipeline")
    parser.add_argument("--per-shard", type=int, default=24, help="clips in a shard")
    parser.add_argument(
        "--shards", nargs="*", default=[], help="tars of your own instead of made ones"
    )
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="of the bare loops, both times together"
    )
    parser.add_argument("--codec", type=Path, default=TINY_CODEC, help="codec folder")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="where the figures go"
    )
    parser.add_argument(
        "--feeder", action="store_true", help="decoders feeding one encoder, no Ray"
    )
    parser.add_argument("--scale", action="store_true", help="sinks and stores, no Ray")
    parser.add_argument(
        "--store-shards", type=int, default=10_000, help="tiny shards of --scale; 0: none"
    )
    parser.add_argument("--device", default="cpu", help="of the feeder's encoder: cpu or cuda")
    parser.add_argument("--decoders", type=int, default=4, help="decoding threads of the feeder")
    options = parser.parse_args(arguments)
    options.source = tuple(int(side) for side in options.source.split("x"))
    return options


def _show_feeder(options: argparse.Namespace, config: PrepareConfig, scratch: Path) -> int:
    """Measure and print the feeder; 0 where its bar is met."""
    shards = options.shards or write_clips(
        scratch / "in",
        FEEDER_CLIPS,
        FEEDER_CLIPS,
        options.source,
        config.bucket.num_frames,
        options.fps,
    )
    figures = feeder(
        config, shards, str(options.codec), options.device, options.decoders, options.clips
    )
    print(
        f"encoder on {options.device} busy {figures['busy_share']:.1%} of the time, "
        f"{figures['clips_per_s']:.2f} clips/s, fed by {figures['decoders']} decoders"
    )
    return 0 if figures["busy_share"] >= BUSY_BAR else 1


def _show_scale(options: argparse.Namespace) -> int:
    """Measure and print the sinks, write `sinks.json`; 0 where every bar is met."""
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flowreel-benchmark-", dir=options.out) as folder:
        result = sinks.scale(options.clips, options.store_shards, Path(folder))
    sinks.show(result)
    (options.out / "sinks.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(holds for _, holds in sinks.verdicts(result)) else 1


def main(arguments: list[str]) -> int:
    """Measure, print, write `prepare.json`; 0 where every bar is met."""
    if arguments[:1] == ["--loop"]:
        text, codec, seconds, *shards = arguments[1:]
        config = PrepareConfig.model_validate_json(text)
        figures = bare_loop(config, shards, codec, float(seconds))
        print(json.dumps(figures))
        return 0
    options = _options(arguments)
    if options.scale:
        return _show_scale(options)
    bucket = Bucket.parse(options.bucket)
    sizes: dict[str, Any] = {
        "num_frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
    }
    config = PrepareConfig(bucket=BucketConfig(**sizes, fps=options.fps))
    with tempfile.TemporaryDirectory(prefix="flowreel-benchmark-") as folder:
        scratch = Path(folder)
        if options.feeder:
            return _show_feeder(options, config, scratch)
        result = compare(options, config, scratch)
    show(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prepare.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(holds for _, holds in verdicts(result)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
