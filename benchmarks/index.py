"""What it costs to open a large dataset: seconds, memory of one and of several ranks, requests.

    python -m benchmarks.index [--rows 1000000] [--shards 1000] [--ranks 4]
    python -m benchmarks.index --store [--counts 100 1000 10000]

Shards of keys without moments are written, and their index is made once. Then fresh processes open
it, as each rank of training does: the first says seconds, how far its memory rose at most, and how
many records it finds a second; then several open it at once and go through all ids, and their
memory is added up, pages that they share once. `--store` counts the requests that opening,
inspecting and resuming take of a store on this machine; it needs the development packages.

Knows nothing of Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.processes import pss_bytes
from data_prep.latents.index import LatentIndex
from data_prep.latents.index_file import INDEX_NAME
from data_prep.latents.records import FORMAT_VERSION
from data_prep.ledger.manifest import FileEntry, Manifest
from data_prep.ledger.manifest_file import ManifestRow, write_manifest_file
from data_prep.storage.store import open_folder
from flowreel.values import sha256_of

ROOT = Path(__file__).resolve().parents[1]
SECONDS_BAR = 1.0
"""An index of a million records is opened within so many seconds."""
MEMORY_BAR = 100e6
"""And within so many bytes."""
BUCKET = "81x384x640"
_LOOK_UPS = 20_000


def write_shards(root: Path, rows: int, shards: int) -> None:
    """A dataset of so many records, with keys and windows and nothing else behind them."""
    info = {"version": FORMAT_VERSION, "prepare_digest": "d"}
    (root / "dataset.json").write_text(json.dumps(info))
    for kind in ("latents", "captions"):
        (root / kind).mkdir()
    write_manifest_file(open_folder(root), _manifests(root, rows, shards))


def _manifests(root: Path, rows: int, shards: int) -> Iterator[ManifestRow]:
    per_shard = -(-rows // shards)
    for number in range(shards):
        shard = f"{number:05d}"
        count = min(per_shard, rows - number * per_shard)
        keys = [f"{shard}{row:04d}" for row in range(count)]
        table = pa.table({"key": keys, "window": pa.array([0] * count, pa.int32())})
        latents, captions = f"latents/{shard}.{BUCKET}.parquet", f"captions/{shard}.parquet"
        for path in (latents, captions):
            pq.write_table(table, root / path, row_group_size=64)
        digest = sha256_of(root / latents)
        files = (
            FileEntry("status", f"status/{shard}.parquet", count, digest),
            FileEntry("latents", latents, count, digest, BUCKET),
            FileEntry("captions", captions, count, digest, failures={}),
        )
        manifest = Manifest(
            shard=shard, source=f"/data/{shard}.tar", fingerprint=f"size:{number} mtime_ns:1",
            job=digest[:16], latent_digest="d", caption_digest="c", num_samples=count,
            truncated=False, ignored_members=0, error="", sha256=digest, counts={"kept": count},
            reasons={}, files=files, notes={}, dropped={}, outcome_digest="o", encode_digest="e",
        )  # fmt: skip
        yield ManifestRow(manifest.head, manifest.to_json())


def memory(name: str) -> int:
    """Bytes of this process: VmRSS (in memory), VmHWM (at most), RssAnon (its own)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def rank(root: Path) -> None:
    """A process that opens the index when it is told to, and says what that took."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets how much memory there was at most
    before, own = memory("VmRSS"), memory("RssAnon")
    print("ready", flush=True)
    sys.stdin.readline()
    began_s = time.perf_counter()
    index = LatentIndex.open(root)
    ids = index.ids("train")[BUCKET]
    opened_s = time.perf_counter() - began_s
    figures: dict[str, Any] = {
        "seconds": opened_s,
        "peak_bytes": memory("VmHWM") - before,
        "own_bytes": memory("RssAnon") - own,
        "records": len(index),
    }
    places = random.Random(0).choices(range(len(ids)), k=_LOOK_UPS)
    names = [ids[place].split("/") for place in places]
    began_s = time.perf_counter()
    found = [index.find(key, int(window), shard) for shard, key, window in names]
    figures["look_ups_per_s"] = len(found) / (time.perf_counter() - began_s)
    assert None not in found
    began_s = time.perf_counter()
    count = sum(len(part) for part in ids.parts())
    figures["ids_per_s"] = count / (time.perf_counter() - began_s)
    figures["own_bytes_after"] = memory("RssAnon") - own
    print(json.dumps(figures), flush=True)
    sys.stdin.readline()


def open_at_once(root: Path, ranks: int) -> tuple[list[dict[str, Any]], int]:
    """Figures of ranks that open the index at once, and the bytes that they take together."""
    command = [sys.executable, "-m", "benchmarks.index", "--rank", str(root)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        processes = []
        for _ in range(ranks):
            processes.append(stack.enter_context(subprocess.Popen(command, cwd=ROOT, **pipes)))
            stack.callback(processes[-1].kill)
        if [_answer(process) for process in processes] != ["ready\n"] * ranks:
            raise RuntimeError("a rank failed before it began; its message is above")
        before = sum(pss_bytes(process.pid) for process in processes)
        for process in processes:
            _tell(process)
        figures = [json.loads(_answer(process)) for process in processes]
        together = sum(pss_bytes(process.pid) for process in processes) - before
    return figures, together


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def verdicts(figures: dict[str, Any]) -> list[tuple[str, bool]]:
    """What was measured of one process, in words, and whether it holds its bar."""
    seconds, peak = figures["seconds"], figures["peak_bytes"]
    return [
        (f"opened in {seconds:.3f} s; bar {SECONDS_BAR:g} s", seconds <= SECONDS_BAR),
        (f"memory rose by {peak / 1e6:.1f} MB; bar {MEMORY_BAR / 1e6:g} MB", peak <= MEMORY_BAR),
    ]


def opening(rows: int, shards: int, ranks: int) -> bool:
    """Print what opening costs; whether the bars are held."""
    with tempfile.TemporaryDirectory(prefix="flowreel-index-") as folder:
        root = Path(folder)
        write_shards(root, rows, shards)
        began_s = time.perf_counter()
        LatentIndex.open(root)
        made_s = time.perf_counter() - began_s
        size = (root / INDEX_NAME).stat().st_size
        print(f"{rows} records of {shards} shards, {platform.machine()}, {os.cpu_count()} CPUs")
        print(f"  made in {made_s:.1f} s; index.arrow has {size / 1e6:.1f} MB")
        (one,), _ = open_at_once(root, 1)
        said = verdicts(one)
        for text, holds in said:
            print(f"  {text}: {'holds' if holds else 'DOES NOT HOLD'}")
        print(
            f"  {one['own_bytes'] / 1e6:.1f} MB of it its own; "
            f"{one['look_ups_per_s']:.0f} look-ups and {one['ids_per_s']:.0f} ids per second"
        )
        several, together = open_at_once(root, ranks)
        own = sum(figures["own_bytes_after"] for figures in several)
        print(
            f"  {ranks} ranks that went through all ids: {together / 1e6:.1f} MB together, "
            f"{own / 1e6:.1f} MB of it their own"
        )
    return all(holds for _, holds in said)


def requests(counts: list[int]) -> bool:
    """Print how often a store is asked, by number of shards; whether only listings grow."""
    from tests.data_prep.many_shards import requests_of
    from tests.data_prep.s3_server import CREDENTIALS, running_store

    by_count = {}
    with tempfile.TemporaryDirectory(prefix="flowreel-index-") as folder:
        os.environ.update({**CREDENTIALS, "XDG_CACHE_HOME": f"{folder}/cache"})
        with running_store(Path(folder)) as store:
            for count in counts:
                by_count[count] = requests_of(store, Path(folder, f"shards{count}"), count)
    print(f"{'shards':>8}  {'':34}{'GET':>6}{'HEAD':>6}{'LIST':>6}{'others':>8}")
    for count, asked in by_count.items():
        for name, methods in asked.items():
            numbers = [methods[method] for method in ("GET", "HEAD", "LIST")]
            print(
                f"{count:>8}  {name:34}{numbers[0]:>6}{numbers[1]:>6}{numbers[2]:>6}"
                f"{methods.total() - sum(numbers):>8}"
            )
    first, *others = by_count.values()
    same = all(
        asked[name][method] == first[name][method]
        for asked in others
        for name in first
        for method in ("GET", "HEAD", "PUT", "POST", "DELETE")
    )
    print(f"  as many for many shards as for few: {'holds' if same else 'DOES NOT HOLD'}")
    return same


def main(arguments: list[str] | None = None) -> int:
    """Print the figures and whether they hold their bars."""
    parser = argparse.ArgumentParser(prog="benchmarks.index", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--store", action="store_true", help="count a store's requests instead")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        rank(options.rank)
        return 0
    if options.store:
        return 0 if requests(options.counts) else 1
    return 0 if opening(options.rows, options.shards, options.ranks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
