"""How fast sinks write moments of 480p, how they scale, and what a shard costs a store in requests.

    python -m benchmarks.prepare --scale [--clips 192] [--store-shards 10000]

Each sink is a process with the real `SinkStage`, as in a run, and takes clip after clip: staging,
then the commit of its shards. Beside it stands a bare loop that writes the same bytes once and
waits for the disk. The same on memory (`/dev/shm`) leaves the disk out. What bounds a core is
measured alone: SHA-256, Parquet without compression, and zstd, which moments are stored without.
For the requests, many tiny shards go into an S3-compatible server (moto, a development dependency)
whose log is counted. Moments are Gaussian: nothing compresses them better than it would real ones.
Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.processes import machine_seconds
from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.records import LATENT_SCHEMA, LatentRecord, write_groups
from data_prep.ledger.job import ShardJob
from data_prep.ledger.locks import lock_writing
from data_prep.ledger.sink import SinkStage, sink_of
from data_prep.row import ROW_SCHEMA
from data_prep.sources.samples import ShardSummary
from data_prep.storage.store import open_folder

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (21, 48, 30, 53)
"""Moments of 81 frames of 480 × 848 by Wan2.2's codec, the recipes' own: [t, C, h, w]."""
FRAMES = (81, 480, 848)
RATE_BAR = 200.0
"""Clips of 480p per second that a sink must write on one core."""
LINEAR_BAR = 0.9
"""Two sinks must write so many times twice what one writes."""
CLIPS_PER_SHARD = 32
FEW_SHARDS = 500
"""Tiny shards whose requests are held against those of many."""
_CONFIG = PrepareConfig(bucket=BucketConfig(num_frames=81, height=480, width=848, fps=16.0))
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_begun_cpu_s = 0.0
"""CPU seconds of this process when it was told to begin."""
_REQUEST = re.compile(rb'"(?:\x1b\[[0-9;]*m)*(GET|PUT|HEAD|DELETE|POST) /')


def job_of(shard: str) -> ShardJob:
    """A job for a shard that nobody reads."""
    return ShardJob(shard, f"/none/{shard}.tar", "size:1 mtime_ns:1", "latents", "captions")


def block_of(
    shard: str,
    numbers: Sequence[int],
    moments: tuple[bytes, bytes],
    shape: tuple[int, ...] = SHAPE,
    frames: tuple[int, ...] = FRAMES,
    closing: int | None = None,
) -> pa.Table:
    """A block as the encoder leaves it: kept clips, and the shard's end where `closing` is given.

    Args:
        shard: name of the shard.
        numbers: of the clips, whose keys follow from them.
        moments: bytes of mean and log-variance, fp16, of every clip.
        shape: [t, C, h, w] of the moments.
        frames: frames, height and width of a clip.
        closing: how many samples the shard has.
    """
    empty = dict.fromkeys(ROW_SCHEMA.names)
    rows: list[dict[str, Any]] = []
    for number in numbers:
        words = {"reason": "", "detail": "", "note": "", "caption": "A car.", "synthetic": "A car."}
        row = {**empty, **words, "shard": shard, "number": number, "key": f"{number:06d}"}
        row |= {"window": 0, "status": "kept", "captioner": "none", "codec": "wan", "look": None}
        row |= {"frames_shape": [*frames, 3], "pts_s": [n / 16 for n in range(frames[0])]}
        row |= {"bars": [0] * 4, "latent_shape": list(shape), "mean": moments[0]}
        rows.append({**row, "logvar": moments[1], "source_digest": "a", "frames_digest": "b"})
    if closing is not None:
        end = json.dumps(asdict(ShardSummary(num_samples=closing)))
        rows.append(
            {**empty, "shard": shard, "number": -1, "key": "", "status": "", "closing": end}
        )
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)


def gaussian_moments(shape: tuple[int, ...] = SHAPE) -> tuple[bytes, bytes]:
    """Mean and log-variance of one clip, fp16."""
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(shape).astype("<f2")
    logvar = (rng.standard_normal(shape) * 0.5 - 6).astype("<f2")
    return mean.tobytes(), logvar.tobytes()


def shards_of(sink: int, sinks: int, count: int) -> list[str]:
    """The first so many names of shards that this sink has."""
    names: list[str] = []
    number = 0
    while len(names) < count:
        if sink_of(f"{number:05d}", sinks) == sink:
            names.append(f"{number:05d}")
        number += 1
    return names


def _write_as_sink(out: str, sink: int, sinks: int, clips: int) -> int:
    """Stage clips one by one, as Ray hands clips of this size over, and commit their shards."""
    names = shards_of(sink, sinks, max(1, clips // CLIPS_PER_SHARD))
    moments = gaussian_moments()
    blocks = [block_of("", [number], moments) for number in range(CLIPS_PER_SHARD)]
    _begin_together()
    with lock_writing(open_folder(out), "benchmark") as still_ours:
        stage = SinkStage(_CONFIG, out, [job_of(name) for name in names], still_ours)
        for name in names:
            shard = pa.array([name])
            place = ROW_SCHEMA.get_field_index("shard")
            for block in blocks:
                stage.accept(block.set_column(place, ROW_SCHEMA.field(place), shard))
            assert stage.accept(block_of(name, [], moments, closing=CLIPS_PER_SHARD)) == {name}
    return len(names) * CLIPS_PER_SHARD


def _write_bare(out: str, sink: int, clips: int) -> int:
    """Write the same bytes, once, and wait for the disk after every shard."""
    mean, logvar = gaussian_moments()
    Path(out).mkdir(parents=True, exist_ok=True)
    _begin_together()
    for shard in range(max(1, clips // CLIPS_PER_SHARD)):
        with Path(out, f"bare-{sink}-{shard}").open("wb", buffering=0) as file:
            for _ in range(CLIPS_PER_SHARD):
                file.write(mean)
                file.write(logvar)
            os.fsync(file.fileno())
    return max(1, clips // CLIPS_PER_SHARD) * CLIPS_PER_SHARD


def _begin_together() -> None:
    """Say that all is loaded, wait for a word, and count CPU seconds from there."""
    print("ready", flush=True)
    sys.stdin.readline()
    global _begun_cpu_s
    _begun_cpu_s = time.process_time()


def work(arguments: Sequence[str]) -> None:
    """A process of the benchmark; prints clips, seconds from the word on, and CPU seconds."""
    kind, out, sink, sinks, clips = arguments
    if kind == "sink":
        done = _write_as_sink(out, int(sink), int(sinks), int(clips))
    else:
        done = _write_bare(out, int(sink), int(clips))
    print(json.dumps([done, time.monotonic(), time.process_time() - _begun_cpu_s]), flush=True)


def rate(kind: str, out: Path, sinks: int, clips: int) -> dict[str, float]:
    """So many processes at once: clips per second together, and per CPU second of one."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.sinks", kind, str(out)]
    workers = [
        subprocess.Popen(
            [*command, str(sink), str(sinks), str(clips)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for sink in range(sinks)
    ]
    ready = [worker.stdout.readline() == "ready\n" for worker in workers if worker.stdout]
    begun_s, (before, _) = time.monotonic(), machine_seconds()
    figures = [json.loads(w.communicate("go\n" if all(ready) else "")[0]) for w in workers]
    took_s, (after, _) = time.monotonic() - begun_s, machine_seconds()
    shutil.rmtree(out, ignore_errors=True)
    done = sum(clips for clips, _, _ in figures)
    ours = sum(cpu_s for _, _, cpu_s in figures)
    return {
        "clips_per_s": done / (max(end for _, end, _ in figures) - begun_s),
        "clips_per_cpu_s": done / ours,
        "others_cpus": max(0.0, (after - before - ours) / took_s),
    }


def bounds() -> dict[str, float]:
    """What one core does of each part alone, in clips of 480p per CPU second; and zstd's saving."""
    mean, logvar = gaussian_moments()
    record = LatentRecord(
        key="a", window=0, number=0, bucket=_bucket(), fps=16.0, pts_s=[0.0] * FRAMES[0],
        mean=np.frombuffer(mean, "<f2").reshape(SHAPE),
        logvar=np.frombuffer(logvar, "<f2").reshape(SHAPE), codec="wan",
    )  # fmt: skip
    group = pa.Table.from_pylist([record.row()], schema=LATENT_SCHEMA)
    result = {}
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        path = Path(folder, "f")
        result["sha256"] = _per_cpu_s(lambda: hashlib.sha256(mean + logvar).digest())
        result["copy"] = _per_cpu_s(lambda: bytearray(mean) + logvar)
        result["written twice, sha256 once"] = _per_cpu_s(lambda: _write_twice(path, mean, logvar))
        result["parquet and sha256"] = _per_cpu_s(
            lambda: write_groups(path, [group], LATENT_SCHEMA)
        )
    result["zstd alone"] = _per_cpu_s(lambda: pa.compress(mean + logvar, codec="zstd"))
    small = len(pa.compress(mean, codec="zstd")), len(pa.compress(logvar, codec="zstd"))
    result["zstd_mean_share"] = small[0] / len(mean)
    result["zstd_logvar_share"] = small[1] / len(logvar)
    return result


def _write_twice(path: Path, mean: bytes, logvar: bytes) -> None:
    """The least that a sink does: what is staged first, to outlive a kill, is written twice."""
    for name in ("staged", "final"):
        with path.with_name(name).open("wb", buffering=0) as file:
            file.write(mean)
            file.write(logvar)
    digest = hashlib.sha256(mean)
    digest.update(logvar)
    path.with_name("staged").unlink()


def _bucket() -> Any:
    from data_prep.latents.records import Bucket

    return Bucket(*FRAMES)


def _per_cpu_s(call: Any) -> float:
    call()
    begun_s, count = time.process_time(), 0
    while count < 8 or time.process_time() - begun_s < 0.5:
        call()
        count += 1
    return count / (time.process_time() - begun_s)


def _memory() -> str | None:
    """A folder that is memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextlib.contextmanager
def counted_store(folder: Path) -> Iterator[tuple[str, Path]]:
    """An S3-compatible server on loopback: the URI of a bucket, and its log of requests."""
    from pyarrow import fs

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    log = folder / "requests.log"
    before = {name: os.environ.get(name) for name in _CREDENTIALS}
    os.environ |= _CREDENTIALS
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(
                            "no S3 server came up; pip install 'moto[s3]' flask flask-cors"
                        ) from None
                    time.sleep(0.05)
            endpoint = f"127.0.0.1:{port}"
            direct = fs.S3FileSystem(
                endpoint_override=endpoint, scheme="http", region="us-east-1",
                allow_bucket_creation=True,
            )  # fmt: skip
            direct.create_dir("bench")
            yield f"s3://bench/out?endpoint_override=http://{endpoint}&region=us-east-1", log
        finally:
            server.kill()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def requests_of_shards(shards: int, out: str, log: Path, *, first: int = 0) -> dict[str, float]:
    """What tiny shards cost a store: requests by kind that their sink made, and seconds.

    Args:
        shards: how many there are, of two clips each, in one block each.
        out: the output in the store of `counted_store`.
        log: its log.
        first: number of the first shard.
    """
    shape, frames = (2, 4, 2, 2), (5, 16, 16)
    moments = gaussian_moments(shape)
    names = [f"{number:05d}" for number in range(first, first + shards)]
    stage = SinkStage(_CONFIG, out, [job_of(name) for name in names])
    # A run lists once what is staged.
    stage.staging.summary(job_of(names[0]))

    def run(name: str) -> None:
        block = block_of(name, [0, 1], moments, shape, frames, closing=2)
        assert stage.accept(block) == {name}

    before, begun_s = log.stat().st_size, time.monotonic()
    with ThreadPoolExecutor(stage.folder.threads // 2) as pool:
        list(pool.map(run, names))
    took_s = time.monotonic() - begun_s
    counts = Counter(kind.decode() for kind in _REQUEST.findall(log.read_bytes()[before:]))
    return {**dict(sorted(counts.items())), "seconds": took_s}


def scale(clips: int, store_shards: int, scratch: Path) -> dict[str, Any]:
    """All figures. `scratch` is a folder on the disk that is measured."""
    result: dict[str, Any] = {"bounds": bounds(), "clips": clips}
    places = {"disk": scratch}
    if (memory := _memory()) is not None:
        places["memory"] = Path(tempfile.mkdtemp(prefix="flowreel-benchmark-", dir=memory))
    try:
        for where, folder in places.items():
            result[where] = {
                f"{kind} {sinks}": rate(kind, folder / "out", sinks, clips // sinks)
                for sinks in (1, 2)
                for kind in ("bare", "sink")
            }
    finally:
        for folder in list(places.values())[1:]:
            shutil.rmtree(folder)
    result["store_shards"] = store_shards
    if store_shards:
        few = min(FEW_SHARDS, store_shards)
        with counted_store(scratch) as (out, log):
            result["requests_few"] = requests_of_shards(few, out, log, first=store_shards)
            result["requests"] = requests_of_shards(store_shards, out, log)
    return result


def verdicts(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each bar and whether it is met."""
    where = "memory" if "memory" in result else "disk"
    one, two = result[where]["sink 1"], result[where]["sink 2"]
    core, linear = one["clips_per_cpu_s"], two["clips_per_cpu_s"] / one["clips_per_cpu_s"]
    met = [
        (f"one sink at least {RATE_BAR:.0f} clips/s a core: {core:.0f}", core >= RATE_BAR),
        (f"of two sinks, each at least {LINEAR_BAR} of one: {linear:.2f}", linear >= LINEAR_BAR),
    ]
    if "requests" in result:
        few, whole = result["requests_few"], result["requests"]
        kinds = sorted((few.keys() | whole.keys()) - {"seconds"})
        times = result["store_shards"] / min(FEW_SHARDS, result["store_shards"])
        same = all(whole.get(kind, 0) == few.get(kind, 0) * times for kind in kinds)
        met.append(("the same requests for every shard of a store", same))
    return met


def show(result: dict[str, Any]) -> None:
    """The tables."""
    print("clips of 480p (6.4 MB of moments)   clips/s   per CPU second   CPUs of others")
    for where in ("disk", "memory"):
        for name, figures in result.get(where, {}).items():
            print(
                f"{where:8} {name:8} {'':16} {figures['clips_per_s']:9.0f} "
                f"{figures['clips_per_cpu_s']:16.0f} {figures['others_cpus']:16.2f}"
            )
    print("\none core alone, clips per CPU second")
    for name, value in result["bounds"].items():
        if not name.endswith("_share"):
            print(f"  {name:20} {value:8.0f}")
    shares = [result["bounds"][f"zstd_{name}_share"] for name in ("mean", "logvar")]
    print(f"  zstd leaves {shares[0]:.0%} of a Gaussian mean, {shares[1]:.0%} of a log-variance")
    if "requests" in result:
        counts = {k: v for k, v in result["requests"].items() if k != "seconds"}
        each = ", ".join(f"{k} {v / result['store_shards']:g}" for k, v in counts.items())
        print(
            f"\n{result['store_shards']} tiny shards into a store, requests a shard: {each}; "
            f"{result['requests']['seconds']:.0f} s"
        )
    for words, holds in verdicts(result):
        print(f"{'met    ' if holds else 'NOT MET'} {words}")


if __name__ == "__main__":
    work(sys.argv[1:])
