"""Starts real training processes (gloo between them), and is what those processes run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from tests.places import ROOT
from training.config import TrainConfig
from training.loop import TrainJob, train
from training.state.stop import stop_signals

TIMEOUT_S = 280


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(
    config: TrainConfig, job: TrainJob, module: str = __name__
) -> list[subprocess.Popen[str]]:
    """`config.workers.count` processes that run the training loop, or this module."""
    settings = {"config": config.model_dump(mode="json"), "job": job.to_dict()}
    port = free_port()
    processes = []
    for rank in range(config.workers.count):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(config.workers.count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", module, json.dumps(settings)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def run(config: TrainConfig, job: TrainJob, module: str = __name__) -> None:
    """Start, wait, and fail with the workers' own words if they fail."""
    processes = start(config, job, module)
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error


def main(settings: dict[str, Any]) -> None:
    job = TrainJob.from_dict(settings["job"])
    with stop_signals(job.out) as signals:
        train(TrainConfig(**settings["config"]), job, ask=signals.notice)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
