"""Runs of `python -m benchmarks.gpu` in processes of their own, as a person starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.places import ROOT


def command(out: Path, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command line of a rehearsal."""
    return [python, "-m", "benchmarks.gpu", "--out", str(out), "--rehearse", *arguments]


def environment() -> dict[str, str]:
    """This environment without what would add modules or threads."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in dropped}
    return variables | {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}


def rehearse(
    out: Path, *arguments: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """A whole run."""
    return subprocess.run(
        command(out, *arguments, python=python),
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
