"""Reading a file over HTTP as preparation reads a shard, against bare loops over the same bytes.

    python -m benchmarks.web                          a file of 512 MiB, served from this machine
    python -m benchmarks.web https://host/00000.tar   your own, over your own network

Each way reads the file front to back in turns, so that all meet the same weather; the best of the
turns counts. The SHA-256 of what came is the same for all, or it is an error. Seconds of the CPU
are those of this process, all threads; where the file is served from this machine, only they say
what a way costs, because the server takes part of the other seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import httpx

from data_prep.storage.location import open_stream

_BLOCK_BYTES = 1 << 20
_SERVED_BYTES = 512 * 2**20
Way = Callable[[str], Iterator[bytes]]


def ours(uri: str) -> Iterator[bytes]:
    """`data_prep.storage.http_file`, by way of `open_stream`."""
    with open_stream(uri) as stream:
        while data := stream.read(_BLOCK_BYTES):
            yield data


def bare(uri: str) -> Iterator[bytes]:
    """One request of httpx, which a cut ends."""
    with httpx.stream("GET", uri, follow_redirects=True) as response:
        yield from response.iter_raw()


def by_fsspec(uri: str) -> Iterator[bytes]:
    """fsspec's own stream; its file in blocks refuses a server without ranges."""
    with fsspec.open(uri, "rb", block_size=0) as stream:
        while data := stream.read(_BLOCK_BYTES):
            yield data


WAYS: dict[str, Way] = {"bare httpx": bare, "ours": ours, "fsspec": by_fsspec}


class Reading(NamedTuple):
    """One reading of the file, with the hash that preparation takes of every shard."""

    seconds: float
    cpu_s: float
    size_bytes: int
    sha256: str


def read_all(way: Way, uri: str) -> Reading:
    """Read the file from front to back."""
    digest, count = hashlib.sha256(), 0
    begun_s, cpu_begun_s = time.perf_counter(), time.process_time()
    for data in way(uri):
        count += len(data)
        digest.update(data)
    seconds, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_begun_s
    return Reading(seconds, cpu_s, count, digest.hexdigest())


@contextlib.contextmanager
def served(size_bytes: int) -> Iterator[str]:
    """The address of a file of random bytes, served by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        block = os.urandom(_BLOCK_BYTES)
        with Path(folder, "a.tar").open("wb") as file:
            for _ in range(size_bytes // _BLOCK_BYTES):
                file.write(block)
        command = [sys.executable, "-u", "-m", "http.server", "0", "-b", "127.0.0.1", "-d", folder]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            assert server.stdout is not None
            port = re.search(r"port (\d+)", server.stdout.readline())
            assert port is not None
            try:
                yield f"http://127.0.0.1:{port[1]}/a.tar"
            finally:
                server.kill()


def measure(uri: str, turns: int) -> list[str]:
    """Lines of a table, each figure with its ratio to the bare loop's. All bytes are equal."""
    readings: dict[str, list[Reading]] = {name: [] for name in WAYS}
    for _ in range(turns):
        for name, way in WAYS.items():
            readings[name].append(read_all(way, uri))
    found = {reading.sha256 for of_way in readings.values() for reading in of_way}
    assert len(found) == 1, "other bytes came"
    rates = {
        name: (
            max(reading.size_bytes / reading.seconds for reading in of_way) / 1e6,
            max(reading.size_bytes / reading.cpu_s for reading in of_way) / 1e6,
        )
        for name, of_way in readings.items()
    }
    rate, cpu_rate = rates["bare httpx"]
    return [
        f"{name:12} {each:6.0f} MB/s {each / rate:5.2f} {of_cpu:8.0f} MB a CPU second "
        f"{of_cpu / cpu_rate:5.2f}"
        for name, (each, of_cpu) in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("uri", nargs="?")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        uri = arguments.uri or stack.enter_context(served(_SERVED_BYTES))
        print("\n".join(measure(uri, arguments.turns)))


if __name__ == "__main__":
    main()
