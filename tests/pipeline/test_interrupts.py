"""Ctrl-C is one line and exit code 130, whenever it is pressed: real processes, real signals."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.config import BucketConfig, PrepareConfig
from data_prep.world.shards import write_world
from pipeline.cluster import interrupts_kept
from tests.data_prep.in_process import prepare_locally
from tests.pipeline.command import interrupted, none_left, one_line, processes_with
from tests.places import ROOT, TINY_CODEC
from tests.serving.conftest import model_dir as model_dir
from training.record.history import read_history
from training.state.checkpoint import latest_complete

AGAIN = "interrupted; run the same command again to go on"


def maps(pid: int) -> str:
    """What a process has mapped so far: which libraries it has begun to import."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu", "pydantic_core"])
def test_while_imports_run(model_dir: Path, tmp_path: Path, library: str) -> None:
    stderr = tmp_path / "stderr"
    code, output = interrupted(
        "sample", str(model_dir), "--prompt", "x", "--out", str(tmp_path / "a.mp4"),
        when=lambda pid: library in maps(pid), mark=secrets.token_hex(8), stderr=stderr,
    )  # fmt: skip
    assert code == 130
    assert one_line(stderr.read_text()) == "interrupted"
    assert not output
    assert not (tmp_path / "a.mp4").exists()


BUCKET = {"num_frames": 5, "height": 32, "width": 32, "fps": 8.0}
SMALL = [
    "model.deep_width=64", "model.shallow_width=32", "model.layers_per_block=[1,1]",
    "model.denoiser_layers=1", "codec=tiny", "model.latent_channels=24", "model.patch_size=1",
    *(f"prepare.bucket.{key}={value}" for key, value in BUCKET.items()),
]  # fmt: skip


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that trains a small model on a small dataset for as long as it is let."""
    folder = tmp_path_factory.mktemp("training")
    shards = write_world(folder / "shards", 40, 8, clips_per_shard=24)
    config = PrepareConfig(bucket=BucketConfig(**BUCKET))
    prepare_locally(config, [str(path) for path in shards], folder / "data", TINY_CODEC)
    settings = [part for value in SMALL for part in ("--set", value)]
    return ["train", "--data", str(folder / "data"), "--steps", "100000", *settings]


@pytest.mark.slow
def test_while_ray_starts(training: list[str], tmp_path: Path) -> None:
    mark, stderr = secrets.token_hex(8), tmp_path / "stderr"

    def ray_is_starting(_pid: int) -> bool:
        return any("gcs_server" in process.name() for process in processes_with(mark))

    code, _ = interrupted(
        *training, "--out", str(tmp_path / "run"), when=ray_is_starting, mark=mark, stderr=stderr
    )
    assert code == 130
    assert one_line(stderr.read_text()) == AGAIN
    assert none_left(mark)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code", "said"),
    [
        (signal.SIGINT, 130, AGAIN),
        (signal.SIGTERM, 143, "terminated, and saved; run the same command again to go on"),
    ],
)
def test_while_workers_train(
    training: list[str], tmp_path: Path, number: signal.Signals, exit_code: int, said: str
) -> None:
    mark, stderr = secrets.token_hex(8), tmp_path / "stderr"
    code, _ = interrupted(
        *training, "--out", str(tmp_path / "run"), number=number,
        when=lambda _pid: "  training " in stderr.read_text(), mark=mark, stderr=stderr,
    )  # fmt: skip
    assert code == exit_code
    *progress, last = stderr.read_text().splitlines()
    assert one_line(last) == said
    saved = latest_complete(tmp_path / "run/checkpoints")
    assert saved is not None, "it saved before it left"
    history = read_history(tmp_path / "run/history.jsonl")
    assert [r["step"] for r in history] == list(range(saved.step))
    assert all(line.startswith("  training ") for line in progress), progress
    assert none_left(mark)


@pytest.mark.parametrize("code", [0, 1])
def test_ray_trains_own_handler_does_not_outlive_the_training(code: int) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def press_with_a_handler_of_rays_kind() -> None:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(code))
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        press_with_a_handler_of_rays_kind()
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(SystemExit), interrupts_kept():
        sys.exit(code)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell without job control starts its background commands so."""
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from pipeline.cli import main\n"
        "sys.argv = ['flowreel', '--version']\ncode = main()\n"
        "sys.exit(code or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def press(code: str) -> subprocess.CompletedProcess[str]:
    """A program that has our handler, and presses Ctrl-C itself."""
    program = (
        "import os, signal, time\nfrom pipeline.cli.failures import INTERRUPTS, say_failure\n"
        "INTERRUPTS.install()\ndef press(): os.kill(os.getpid(), signal.SIGINT)\n"
        f"try:\n{code}\nexcept BaseException as error:\n    raise SystemExit(say_failure(error))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize(
    "code",
    [
        "    press(); time.sleep(60)",
        # A library that drops the exception, and one that makes another of it.
        "    try:\n        press(); time.sleep(9)\n    except BaseException:\n        pass\n"
        "    time.sleep(60)",
        "    try:\n        press(); time.sleep(9)\n    except BaseException:\n"
        "        raise ImportError('no such module') from None",
        # Python drops what a destructor raises.
        "    class A:\n        def __del__(self):\n            press(); time.sleep(9)\n"
        "    A()\n    time.sleep(60)",
    ],
    ids=["plain", "dropped", "turned into another", "in a destructor"],
)
def test_it_never_gets_lost(code: str) -> None:
    ended = press(code)
    assert ended.returncode == 130
    assert one_line(ended.stderr) == "interrupted"


def test_source_that_c_code_runs_does_not_take_the_exit_code(tmp_path: Path) -> None:
    """Some libraries run source from C while they are imported; Python remembers its interrupt."""
    (tmp_path / "lost.py").write_text(
        "import ctypes, sys\nfrom pipeline.cli.failures import INTERRUPTS, say_failure\n"
        "INTERRUPTS.install()\n"
        "try:\n"
        "    ctypes.pythonapi.PyRun_SimpleString("
        "b'import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)')\n"
        "    import time; time.sleep(60)\n"
        "except BaseException as error:\n    code = say_failure(error)\n"
        "INTERRUPTS.end()\nsys.exit(code)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "lost"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert ended.returncode == 130, ended.stderr


def test_clean_up_is_not_interrupted_again() -> None:
    ended = press(
        "    try:\n        press(); time.sleep(60)\n    finally:\n"
        "        time.sleep(2); print('all cleaned up')"
    )
    assert ended.returncode == 130
    assert ended.stdout == "all cleaned up\n"


def test_the_handler_of_a_program_that_only_imports_us_is_its_own() -> None:
    import pipeline.cli
    import pipeline.cli.failures

    assert pipeline.cli.main
    assert signal.getsignal(signal.SIGINT) != pipeline.cli.failures.INTERRUPTS._on_interrupt
