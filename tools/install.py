"""Makes `.venv`: the locked packages, one build of torch, and this checkout itself.

    python tools/install.py --torch cpu|gpu [--uv PATH] [--torch-index URL]

Three steps, each of which says what it is about to do: the packages of `requirements.lock`, checked
by their hashes; torch, at the version of `constraints.txt`, from where the chosen build is; the
checkout, editable. A step that was done before takes seconds. It runs on any Python, so that one
that is too old is told so; standard library only. Knows nothing of the project's own packages.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    version = platform.python_version()
    sys.exit(
        f"Flowreel needs Python 3.11 or newer, this is {version}; try: make PYTHON=python3.12 ..."
    )

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
CONSTRAINTS = ROOT / "constraints.txt"

DOWNLOAD_MB = {"packages": 450, "cpu": 200, "gpu": 2700}
"""What has to be downloaded, on Linux and x86-64; docs/setup.md has the other machines."""
ROOM_GB = {"cpu": 3.5, "gpu": 9.5}
"""What must be free on the disk: the environment, and pip's cache of what was downloaded."""


def torch_pin(constraints: str) -> str:
    """The line of the constraints that pins torch.

    >>> torch_pin("# pins\\ntorch==2.13.0\\nray==2.60.0\\n")
    'torch==2.13.0'
    """
    return next(line for line in constraints.splitlines() if line.startswith("torch=="))


def torch_sources(build: str, system: str, index: str) -> list[tuple[str, list[str]]]:
    """Where to look for a build of torch: pairs of words for the terminal and arguments for pip.

    They are tried in turn. A wheel at hand is one in a folder that pip's own configuration names
    as `find-links`. Only on Linux does the default index hold the CUDA build; elsewhere it is the
    CPU's anyway.

    >>> [words for words, _ in torch_sources("gpu", "Linux", "https://example.org/cpu")]
    ['the default index']
    >>> [words for words, _ in torch_sources("cpu", "Linux", "https://example.org/cpu")]
    ['a wheel at hand', 'https://example.org/cpu', 'the default index']
    """
    default: tuple[str, list[str]] = ("the default index", [])
    if build == "gpu" or system != "Linux":
        return [default]
    # Without dependencies: the lock has all that the CPU build needs, so that a second index
    # is asked for torch alone.
    return [
        ("a wheel at hand", ["--no-index", "--no-deps"]),
        (index, ["--index-url", index, "--no-deps"]),
        default,
    ]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def fail(text: str) -> None:
    """Stop with one line."""
    sys.exit(f"flowreel set-up: {text}")


class Installer:
    """Installs into one environment, by uv where there is one and by pip where not.

    Args:
        python: the environment's interpreter.
        uv: path of uv, or empty for pip.
    """

    def __init__(self, python: Path, uv: str) -> None:
        self.python, self.uv = python, uv

    def install(self, *arguments: str, by_pip: bool = False, quiet: bool = False) -> bool:
        """Whether the installation went well; its output goes to the terminal as it comes."""
        if self.uv and not by_pip:
            command = [self.uv, "pip", "install", "--python", str(self.python)]
        else:
            command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install"]
        output = subprocess.DEVNULL if quiet else None
        process = subprocess.run([*command, *arguments], cwd=ROOT, stdout=output, stderr=output)
        return process.returncode == 0

    def version(self, package: str) -> str:
        """The installed version of a package, or nothing where it is not installed."""
        code = (
            "import importlib.metadata as m, sys\n"
            "try: print(m.version(sys.argv[1]))\n"
            "except m.PackageNotFoundError: pass"
        )
        command = [str(self.python), "-c", code, package]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make_environment() -> Path:
    """`.venv` with this Python, made anew where it was made with another; its interpreter."""
    python = VENV / "bin" / "python"
    wanted = "{}.{}".format(*sys.version_info)
    if python.exists():
        code = "import sys; print('{}.{}'.format(*sys.version_info))"
        process = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        present = process.stdout.strip()
        if present == wanted:
            return python
        say(f".venv has Python {present or 'that does not run'}; making it anew with {wanted}")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if subprocess.run(command).returncode != 0:
        fail("python -m venv failed; on Debian and Ubuntu: apt install python3-venv")
    return python


def check_room(build: str) -> None:
    """Refuse a disk that cannot hold the environment."""
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < ROOM_GB[build]:
        fail(
            f"{free_gb:.1f} GB are free here, {ROOM_GB[build]} GB are needed for the {build} "
            "build; make room, or clone into a larger disk"
        )


def install_torch(installer: Installer, pin: str, build: str, index: str) -> None:
    """Torch at its pinned version, from the first source that has it."""
    sources = torch_sources(build, platform.system(), index)
    for place, (words, arguments) in enumerate(sources):
        local, last = words == "a wheel at hand", place == len(sources) - 1
        if not local:
            cuda = last and platform.system() == "Linux"
            say(f"{pin} from {words}: about {DOWNLOAD_MB['gpu' if cuda else 'cpu']} MB")
            if cuda and build == "cpu":
                print(
                    "   That is the CUDA build: the CPU's index could not be reached.", flush=True
                )
        # uv does not read pip's configuration, which is what names wheels at hand.
        if installer.install(*arguments, pin, by_pip=local, quiet=local):
            if local:
                say(f"{pin} from {words}")
            return
    fail(f"{pin} could not be installed; the lines above say why")


def main() -> None:
    parser = argparse.ArgumentParser(description="make .venv from the lock")
    parser.add_argument("--torch", choices=("cpu", "gpu"), default="cpu", help="build of torch")
    parser.add_argument("--torch-index", required=True, help="index of torch's CPU builds")
    parser.add_argument("--uv", default="", help="path of uv; empty: use pip")
    options = parser.parse_args()
    started = time.monotonic()
    pin = torch_pin(CONSTRAINTS.read_text())
    marker = VENV / f"made-for-{options.torch}"
    fresh = not any(VENV.glob("made-for-*"))
    if fresh:
        check_room(options.torch)
    installer = Installer(make_environment(), options.uv)

    tool = "uv" if options.uv else "pip"
    size = f": about {DOWNLOAD_MB['packages']} MB, then a minute without a word" if fresh else ""
    say(f"the packages of requirements.lock, by {tool}{size}")
    if not installer.install("--require-hashes", "--no-deps", "--requirement", str(LOCK)):
        fail(
            "the packages could not be installed; the lines above say why, and "
            "make setup goes on from here"
        )

    if not (marker.exists() and marker.read_text() == pin):
        if not fresh:
            # Both builds satisfy the pin, so the other build would be taken for the wanted one.
            command = [str(installer.python), "-m", "pip", "uninstall", "--yes", "torch"]
            subprocess.run(command, check=True)
        for other in VENV.glob("made-for-*"):
            other.unlink()
        install_torch(installer, pin, options.torch, options.torch_index)

    say("this checkout, editable")
    # The lock has setuptools: with it the build needs no index.
    if not installer.install("--no-deps", "--no-build-isolation", "--editable", str(ROOT)):
        fail("the checkout could not be installed; the lines above say why")
    marker.write_text(pin)
    size_gb = sum(f.lstat().st_size for f in VENV.rglob("*") if f.is_file()) / 1e9
    torch = installer.version("torch")
    say(f"ready: torch {torch}, {size_gb:.1f} GB, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
