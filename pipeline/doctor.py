"""`flowreel doctor`: what on this machine would keep Flowreel from working, and the way out.

Every check is a function that yields findings; a check that fails itself is a finding too. Needs
only what a plain installation has. Changes nothing. Knows nothing of Ray.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.console import Reporter
from pipeline.recipes import TINY_CODEC, Recipe

GIB = 2**30
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "ray", "diffusers", "transformers", "safetensors", "webdataset", "av", "einops",
    "mlflow", "pyarrow", "numpy", "pillow", "pydantic", "fastapi", "uvicorn", "httpx", "matplotlib",
    "jinja2", "SQLAlchemy", "python-multipart",
)  # fmt: skip
"""What has to be installed, beside what this command itself needs to run."""
OLDEST_PYTHON = (3, 11)
DEMO_MEMORY, DEMO_DISK, TEMPORARY_DISK = 6 * GIB, 5 * GIB, 2 * GIB
SOCKET_PATH_CHARS = 60
"""Ray's sockets lie below the temporary folder, and the path of a socket has at most 107 bytes."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: what was looked at.
        level: ok; warn: it works, but worse; fail: it does not work.
        found: what is there.
        advice: what to do; empty where all is well.
    """

    what: str
    level: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(recipe: Recipe, reporter: Reporter) -> bool:
    """Print what was found; whether everything that a recipe needs is there."""
    findings = [finding for check in CHECKS for finding in _guarded(check, recipe)]
    rows = [[f.what, f.level, f.found, f.advice] for f in findings]
    reporter.table("flowreel doctor", ["what", "", "found", "advice"], rows, left=True)
    fit = all(finding.level != "fail" for finding in findings)
    reporter.document({"fit": fit, "recipe": recipe.name, "findings": findings})
    return fit


def _guarded(check: Callable[[Recipe], Iterator[Finding]], recipe: Recipe) -> Iterator[Finding]:
    """The findings of a check, and its own failure as one more."""
    try:
        yield from check(recipe)
    except Exception as error:
        found = " ".join(str(error).split())[:200] or type(error).__name__
        name = check.__name__.strip("_").replace("_", " ")
        yield Finding(name, "fail", found, "run `make setup`")


def _python(_recipe: Recipe) -> Iterator[Finding]:
    version = sys.version.split()[0]
    if sys.version_info[:2] >= OLDEST_PYTHON:
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "fail", version, "use Python 3.11 or newer")


def _places(_recipe: Recipe) -> Iterator[Finding]:
    for what, path in (("checkout", ROOT), ("environment", Path(sys.prefix))):
        if re.search(r"\s", str(path)):
            advice = "scripts and build tools fail on spaces: move it to a path without them"
            yield Finding(what, "warn", str(path), advice)
        else:
            yield Finding(what, "ok", str(path))


def pinned_versions(constraints: str) -> dict[str, str]:
    """The versions that a constraints file pins, by the package's name in lower case.

    >>> pinned_versions("# all\\ntorch==2.13.0\\nPyYAML==6.0.3 ; python_version > '3'\\n")
    {'torch': '2.13.0', 'pyyaml': '6.0.3'}
    """
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", constraints, flags=re.MULTILINE)
    return {name.lower(): version for name, version in pins}


def _packages(_recipe: Recipe) -> Iterator[Finding]:
    file = ROOT / "constraints.txt"
    pins = pinned_versions(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in PACKAGES:
        pinned = pins.get(name.lower())
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "fail", "not installed", "run `make setup`")
            continue
        # A build of the same version, such as 2.13.0+cpu, is that version.
        if pinned is None or version.partition("+")[0] == pinned:
            yield Finding(name, "ok", version)
        else:
            advice = f"tested with {pinned} (constraints.txt): run `make setup`"
            yield Finding(name, "warn", version, advice)


def _h264_round_trip(_recipe: Recipe) -> Iterator[Finding]:
    import numpy as np

    from media.read import read_video
    from media.write import encode_mp4

    frames = np.zeros((5, 64, 64, 3), dtype=np.uint8)
    count = len(read_video(encode_mp4(frames, fps=8.0)).frames)
    good = count == len(frames)
    advice = "" if good else "reinstall av"
    yield Finding("H.264 round trip", "ok" if good else "fail", f"{count} of 5 frames", advice)


def _tiny_codec(_recipe: Recipe) -> Iterator[Finding]:
    from flow.codec import VideoCodec

    codec = VideoCodec.load(TINY_CODEC)
    found = f"{codec.latent_channels} channels, digest {codec.digest}"
    yield Finding("tiny codec", "ok", found)


def _processor_and_memory(_recipe: Recipe) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    advice = "" if cores >= 2 else "the demo is planned for two; it takes longer"
    yield Finding("CPU cores", "warn" if advice else "ok", str(cores), advice)
    free = available_memory()
    if free is None:
        yield Finding("free memory", "ok", "unknown: this system does not say")
        return
    advice = "" if free >= DEMO_MEMORY else "the demo takes up to 6 GB: close other programs"
    yield Finding("free memory", "warn" if advice else "ok", f"{free / GIB:.1f} GiB", advice)


def available_memory() -> int | None:
    """Bytes that programs can still take; None where the system does not say.

    A container may have less than its machine.
    """
    free: int | None = None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), flags=re.MULTILINE)
        free = int(match.group(1)) * 1024 if match else None
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if free is not None and limit.is_file() and used.is_file():
        most = limit.read_text().strip()
        if most.isdigit():
            free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def _disk(_recipe: Recipe) -> Iterator[Finding]:
    temporary = Path(tempfile.gettempdir())
    for what, folder, least, holds in (
        ("free disk here", Path.cwd(), DEMO_DISK, "a run's latents and checkpoints"),
        ("free disk for Ray", temporary, TEMPORARY_DISK, "what Ray spills"),
    ):
        free = shutil.disk_usage(folder).free
        found = f"{free / GIB:.1f} GiB in {folder}"
        advice = "" if free >= least else f"keep {least / GIB:.0f} GiB free for {holds}"
        yield Finding(what, "warn" if advice else "ok", found, advice)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        advice = "" if free >= GIB else "Ray spills to disk; start a container with --shm-size=2g"
        yield Finding("shared memory", "warn" if advice else "ok", f"{free / GIB:.1f} GiB", advice)


def _temporary_folder(_recipe: Recipe) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        short = len(folder) < SOCKET_PATH_CHARS
        advice = "" if short else "Ray's sockets need a short path: set TMPDIR to one, such as /tmp"
        yield Finding("temporary folder", "ok" if short else "warn", folder, advice)


def _loopback_port(_recipe: Recipe) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield Finding("loopback port", "ok", str(probe.getsockname()[1]))


def _gpus(recipe: Recipe) -> Iterator[Finding]:
    import torch

    yield gpu_finding(recipe, torch.cuda.device_count())


def gpu_finding(recipe: Recipe, gpus: int) -> Finding:
    """So many GPUs, held against what a recipe wants of them."""
    present = f"{gpus} GPU{'' if gpus == 1 else 's'}"
    workers, backend = recipe.train.workers.count, recipe.train.workers.backend
    serving, preparing = recipe.serve.resources, recipe.prepare.concurrency
    needs = {
        f"training with {workers} workers on nccl": workers if backend == "nccl" else 0,
        "serving": serving.deep_replicas * serving.deep_gpus
        + serving.decoder_replicas * serving.decoder_gpus,
        "preparing": preparing.captioner_gpus + preparing.encoder_gpus,
    }
    what, most = max(needs.items(), key=lambda need: need[1])
    if most > gpus:
        advice = f"recipe {recipe.name!r} wants {most:g} for {what}: run it on a machine or a "
        advice += "cluster that has them, or choose another recipe"
        return Finding("GPUs", "fail", present, advice)
    if backend == "auto" and 0 < gpus < workers:
        advice = f"recipe {recipe.name!r} trains with {workers} workers: with fewer GPUs they all "
        advice += "train on CPUs; set the number of workers to that of the GPUs"
        return Finding("GPUs", "warn", present, advice)
    return Finding("GPUs", "ok", present if gpus else "none; everything runs on CPU")


CHECKS: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (
    _python, _places, _packages, _h264_round_trip, _tiny_codec,
    _processor_and_memory, _disk, _temporary_folder, _loopback_port, _gpus,
)  # fmt: skip
"""In the order of the table."""
