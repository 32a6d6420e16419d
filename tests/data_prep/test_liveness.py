"""A run whose Ray has died ends soon, with one line that says what is kept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.liveness import Endpoint, RayEnded, answers, ended_with
from data_prep.world.shards import write_world
from tests.data_prep.in_process import digests, prepare_locally
from tests.data_prep.ray_cluster import RAY_ENVIRONMENT
from tests.pipeline.command import PYTHON, flowreel, one_line
from tests.places import ROOT

WAIT_S = 60.0


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Listens, and accepts nobody: as busy as a process can be."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def endpoint(server: socket.socket, patience_s: float = 0.0) -> Endpoint:
    return Endpoint("a process", "127.0.0.1", server.getsockname()[1], patience_s)


def test_a_process_that_went_away_interrupts_the_main_thread(server: socket.socket) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    gone = endpoint(server)
    assert answers(gone)
    deadline = time.monotonic() + WAIT_S

    def wait() -> None:
        with ended_with([gone]):
            server.close()
            while time.monotonic() < deadline:
                time.sleep(0.01)

    with pytest.raises(RayEnded, match=r"a process at 127\.0\.0\.1:\d+ has not answered"):
        wait()
    assert not answers(gone)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_one_that_is_busy_or_may_come_back_is_waited_for(server: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        watched = [endpoint(server), endpoint(other, patience_s=3600.0)]
        with ended_with(watched):
            other.close()
            time.sleep(3.0)
    assert [answers(process) for process in watched] == [True, False]


def test_what_cannot_be_reached_from_the_start_is_not_watched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        away = endpoint(other)
    with ended_with([away]):
        time.sleep(3.0)


def test_an_error_with_a_process_gone_is_that_the_process_is_gone(server: socket.socket) -> None:
    watched = [endpoint(server, patience_s=3600.0)]
    with pytest.raises(KeyError), ended_with(watched):
        raise KeyError("our own fault")

    def fail() -> None:
        server.close()
        raise ConnectionError("what Ray makes of it")

    with pytest.raises(RayEnded, match="does not answer"), ended_with(watched):
        fail()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_run_whose_ray_is_killed_says_so_and_the_same_command_goes_on(
    victim: str, tmp_path: Path
) -> None:
    from pipeline.recipes import load_recipe

    shards = [str(path) for path in write_world(tmp_path / "in", 100, 0, clips_per_shard=10)]
    out = tmp_path / "out"
    arguments = ("prepare", "--shards", str(tmp_path / "in"), "--out", str(out))
    environment = {**os.environ, **RAY_ENVIRONMENT, "RAY_gcs_rpc_server_reconnect_timeout_s": "45"}
    process = subprocess.Popen(
        [*PYTHON, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    try:
        give_up = time.monotonic() + 300
        while not list(out.glob("staging/*/*/*.arrow")) + list(out.glob("manifests/*.json")):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        (ray_process,) = [child for child in children if child.name() == victim]
        ray_process.kill()
        _, errors = process.communicate(timeout=200)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 2, errors
    line = one_line(next(text for text in errors.splitlines() if text.startswith("flowreel: ")))
    assert line.startswith("Ray ended: ")
    assert "of 10 shards are finished and kept" in line
    assert line.endswith("run the same command again to go on")

    ended = flowreel(*arguments, timeout_s=400)
    assert ended.returncode == 0, ended.stderr
    recipe = load_recipe("tiny")
    prepare_locally(recipe.prepare, shards, tmp_path / "whole", Path(recipe.codec_source))
    ours = {name: digest for name, digest in digests(out).items() if name != "recipe.yaml"}
    assert ours == digests(tmp_path / "whole")


def test_only_the_main_thread_is_interrupted() -> None:
    """In a thread of its own a run is not watched, and not broken either."""
    script = (
        "import threading\nfrom data_prep.liveness import Endpoint, ended_with\n"
        "def run():\n    with ended_with([Endpoint('nobody', '127.0.0.1', 1, 0.0)]):\n"
        "        done.append(1)\n"
        "done = []\nthread = threading.Thread(target=run)\nthread.start()\nthread.join()\n"
        "assert done\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)
