"""One measured run of `prepare` on a Ray of its own: a process that `benchmarks.prepare` starts.

    python -m benchmarks.on_ray CONFIG_JSON OUT CODEC CPUS SHARD...

Its last line of output is the figures. Knows nothing of what they are compared with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# As `flowreel` starts its own cluster: workers of normal priority.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray

from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
from data_prep.progress import RunState


def main(arguments: list[str]) -> None:
    """Prepare, and print as JSON the report, the stages and the time of every finished sample."""
    config_json, out, codec, cpus, *shards = arguments
    config = PrepareConfig.model_validate_json(config_json)
    ray.init(
        num_cpus=int(cpus),
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    times: list[float] = []

    def note(state: RunState) -> None:
        if state.samples > len(times):
            times.append(time.monotonic())
            if state.samples == 1:
                print("STARTED", flush=True)

    report = prepare(config, shards, Path(out), codec, progress=note)
    print("ENDED", flush=True)
    stages = [{**asdict(stage), "utilisation": stage.utilisation} for stage in report.stages]
    figures = {"counts": report.counts, "seconds": report.seconds, "startup_s": report.startup_s}
    print(json.dumps({**figures, "stages": stages, "times": times}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
