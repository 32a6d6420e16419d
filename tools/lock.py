"""Writes `requirements.lock`: every package that Flowreel needs, pinned, with its hashes.

    python tools/lock.py [--uv PATH]

uv resolves the dependencies of `pyproject.toml`, with the pins of `constraints.txt`, for every
system and every Python from 3.11 on. Versions that the present lock has are kept where they may be.
Only metadata is downloaded. torch is left out, because its builds are files of different hashes;
so is what only its CUDA build needs, which torch itself pins. Where uv is missing, it is installed
into an environment that is thrown away. Standard library only. Knows nothing of the project's own
packages.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)")
"""Names of torch and of what only its CUDA build needs."""


def names_of(lock: str) -> list[str]:
    """The packages that a lock pins, in its order.

    >>> names_of("# by uv\\nav==18.1.0 \\\\\\n    --hash=sha256:0\\nray==2.60.0 ; os_name\\n")
    ['av', 'ray']
    """
    return re.findall(r"^([A-Za-z0-9._-]+)==", lock, flags=re.MULTILINE)


def uv_in(folder: Path) -> str:
    """Path of a uv that is installed there for this once."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"]
    subprocess.run(pip, check=True)
    return str(folder / "bin" / "uv")


def compile_lock(uv: str, lock: Path, *options: str) -> None:
    command = [
        uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11",
        "--extra", "evaluate", "--extra", "dev", "--constraint", "constraints.txt",
        "pyproject.toml", "--output-file", str(lock), "--custom-compile-command", "make lock",
        *options,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="write requirements.lock")
    parser.add_argument("--uv", default="", help="path of uv; empty: install one for this once")
    options = parser.parse_args()
    lock = ROOT / "requirements.lock"
    with tempfile.TemporaryDirectory() as temporary:
        uv = options.uv or uv_in(Path(temporary) / "uv")
        whole = Path(temporary) / "requirements.lock"
        if lock.exists():
            whole.write_text(lock.read_text())  # uv keeps the versions of a lock that is there
        compile_lock(uv, whole, "--no-annotate")
        left_out = [name for name in names_of(whole.read_text()) if CUDA.fullmatch(name)]
        without = [word for name in left_out for word in ("--no-emit-package", name)]
        compile_lock(uv, lock, "--generate-hashes", *without)
    names = names_of(lock.read_text())
    print(f"requirements.lock: {len(names)} packages; left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
