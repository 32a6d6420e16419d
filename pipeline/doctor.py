"""`flowreel doctor`: looks at the machine and says, in one table, what would keep Flowreel from working here. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import Reporter

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the table: `level` is ok, warn (works, worse) or fail (does not work)."""

    what: str
    level: str
    found: str
    advice: str = ""


def _python() -> Finding:
    version = sys.version.split()[0]
    good = sys.version_info >= (3, 11)
    return Finding(
        "python", "ok" if good else "fail", version, "" if good else "use Python 3.11 or newer"
    )


def _packages() -> Iterator[Finding]:
    for name in ("torch", "ray", "diffusers", "transformers", "mlflow", "av", "webdataset"):
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fail", "not installed", "run make setup")


def _h264() -> Finding:
    import numpy as np

    from media.read import read_video
    from media.write import encode_mp4

    frames = np.zeros((5, 64, 64, 3), dtype=np.uint8)
    seen = len(read_video(encode_mp4(frames, fps=8.0)).frames)
    good = seen == 5
    return Finding(
        "H.264 round trip",
        "ok" if good else "fail",
        f"{seen} of 5 frames",
        "" if good else "reinstall av",
    )


def _codec() -> Finding:
    from flow.codec import VideoCodec
    from pipeline.recipes import TINY_CODEC

    codec = VideoCodec.load(TINY_CODEC)
    return Finding("tiny codec", "ok", f"{codec.latent_channels} channels, digest {codec.digest}")


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    cores = os.cpu_count() or 1
    yield Finding(
        "CPU cores",
        "ok" if cores >= 2 else "warn",
        str(cores),
        "" if cores >= 2 else "the demo is planned for two",
    )
    free = psutil.virtual_memory().available
    enough = free > 6 * GIB
    yield Finding(
        "free memory",
        "ok" if enough else "warn",
        f"{free / GIB:.1f} GiB",
        "" if enough else "the demo takes up to 6 GB",
    )
    disk = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        "free disk here",
        "ok" if disk > 5 * GIB else "warn",
        f"{disk / GIB:.0f} GiB",
        "" if disk > 5 * GIB else "keep 5 GiB free",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free
        small = size < GIB
        advice = (
            "Ray's object store spills to disk; in a container, start it with --shm-size=2g"
            if small
            else ""
        )
        yield Finding("shared memory", "warn" if small else "ok", f"{size / GIB:.1f} GiB", advice)
    gpus = torch.cuda.device_count()
    yield Finding(
        "GPUs",
        "ok",
        f"{gpus} ({torch.cuda.get_device_name(0)})" if gpus else "none; everything runs on CPU",
    )


def _files() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        # Ray's sockets live under the temporary folder, and a socket's path has at most 107 bytes.
        short = len(folder) < 60
        yield Finding(
            "temporary folder",
            "ok" if short else "warn",
            folder,
            "" if short else "set TMPDIR to a short path",
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield Finding("loopback port", "ok", str(probe.getsockname()[1]))


def _findings() -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    checks: tuple[Callable[[], Finding], ...] = (_h264, _codec)
    for check in checks:
        try:
            yield check()
        except (ValueError, OSError, ImportError) as error:
            yield Finding(
                check.__name__.strip("_"), "fail", str(error).splitlines()[0], "run make setup"
            )
    yield from _machine()
    yield from _files()


def examine() -> bool:
    """Print the table; True when nothing failed."""
    reporter, findings = Reporter(), []
    for finding in _findings():
        findings.append(finding)
    rows = [[f.what, f.level, f.found, f.advice] for f in findings]
    reporter.table("flowreel doctor", ["what", "", "found", "advice"], rows)
    return all(f.level != "fail" for f in findings)
