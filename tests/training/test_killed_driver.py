"""A killed driver takes its Ray workers with it; the next call goes on from the checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from flow.model_folder import load_model
from tests.places import ROOT
from tests.training.world import write_dataset
from training.record.history import read_history
from training.state.checkpoint import latest_complete

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_killed_driver_takes_its_workers_with_it_and_the_next_resumes(tmp_path: Path) -> None:
    dataset, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    environment = {**os.environ, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.ray_driver", str(dataset), str(out)]

    errors = tmp_path / "errors.txt"

    def start() -> subprocess.Popen[bytes]:
        with errors.open("wb") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file
            )

    driver = start()
    while latest_complete(out / "checkpoints") is None:
        assert driver.poll() is None, errors.read_text()
        time.sleep(0.05)
    # Ray's own agents notice a dead raylet only after some time; they hold no data and do no work.
    agents = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")
    children = [
        p for p in psutil.Process(driver.pid).children(recursive=True) if p.name() not in agents
    ]
    assert any("RayTrainWorker" in " ".join(p.cmdline()) for p in children)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [p.name() for p in alive]
    interrupted = latest_complete(out / "checkpoints")
    assert interrupted is not None
    assert interrupted.step < 300
    second = start()
    assert second.wait(timeout=600) == 0, errors.read_text()
    history = read_history(out / "history.jsonl")
    assert [r["step"] for r in history] == list(range(300))
    model, _spec = load_model(out / "model")
    assert all(torch.isfinite(p).all() for p in model.parameters())
