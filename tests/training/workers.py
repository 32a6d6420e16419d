"""Real training processes (gloo between them): started, or forked, and what they run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.places import ROOT
from tests.training.group import TIMEOUT_S, results
from training.config import TrainConfig
from training.loop import TrainJob, train
from training.state.stop import stop_signals

__all__ = ["TIMEOUT_S", "free_port", "main", "run", "start"]


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
    """The same, forked of one process, to their end; fails with their own words if they fail."""
    settings = {"config": config.model_dump(mode="json"), "job": job.to_dict()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "group")
        results(f"{module}:main", config.workers.count, place, settings=settings)


def main(settings: dict[str, Any]) -> None:
    job = TrainJob.from_dict(settings["job"])
    with stop_signals(job.out) as signals:
        train(TrainConfig(**settings["config"]), job, ask=signals.notice)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
