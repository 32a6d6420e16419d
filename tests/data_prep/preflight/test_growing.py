"""A run starts the machines that it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from tests.data_prep.preflight.autoscaling import growing_cluster
from tests.data_prep.ray_cluster import RAY_ENVIRONMENT
from tests.places import ROOT

DRIVER = """
import json, sys, ray
from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
address, config, out, codec, *shards = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
cpus = [ray.cluster_resources().get("CPU", 0)]
report = prepare(PrepareConfig.model_validate_json(config), shards, out, codec)
cpus.append(ray.cluster_resources()["CPU"])
print(json.dumps({"cpus": cpus, "counts": report.counts}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_head_without_cpus_starts_machines_for_a_run(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    world: list[str],
    codec_dir: Path,
    config: PrepareConfig,
) -> None:
    # Ray reads once in a process whether its clusters have tokens: so the driver has its own.
    environment = {**os.environ, **RAY_ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}
    # Sockets have short names.
    with growing_cluster(tmp_path_factory.mktemp("r"), machine_cpus=4, machines=1) as address:
        driver = subprocess.run(
            [sys.executable, "-c", DRIVER, address, config.model_dump_json(), str(tmp_path / "out"),
             str(codec_dir), *world],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip
    assert driver.returncode == 0, driver.stderr
    said = json.loads(driver.stdout.splitlines()[-1])
    assert said == {"cpus": [0, 4], "counts": {"kept": 11}}
