"""Several gloo processes that share one import of torch, and what they compute.

`results` starts one process, which forks the workers: ten times as quick as starting each by
itself. Every worker runs `function`, and gives its result back through a file.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.places import ROOT

TIMEOUT_S = 280


def results(function: str, world: int, folder: Path, **arguments: Any) -> list[Any]:
    """What `module:name` returns on every worker, in the order of their ranks.

    Args:
        arguments: plain values that JSON carries.
        folder: an empty one, for the workers' files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"function": function, "world": world, "folder": str(folder), "with": arguments}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.group", json.dumps(settings)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(settings: dict[str, Any], rank: int) -> int:
    """One worker's life; its exit code."""
    folder, world = Path(settings["folder"]), settings["world"]
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        module, name = settings["function"].split(":")
        result = getattr(importlib.import_module(module), name)(**settings["with"])
        torch.save(result, folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        # A fork must never go on as its parent.
        traceback.print_exc()
        return 1
    return 0


def main(settings: dict[str, Any]) -> int:
    """Fork the workers and wait; when one fails, the others are ended."""
    importlib.import_module(settings["function"].split(":")[0])
    workers: set[int] = set()
    for rank in range(settings["world"]):
        if not (pid := os.fork()):
            code = _work(settings, rank)
            sys.stderr.flush()
            os._exit(code)
        workers.add(pid)
    failed = False
    while workers:
        pid, status = os.wait()
        workers.discard(pid)
        if status and not failed:
            failed = True
            for other in workers:
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
