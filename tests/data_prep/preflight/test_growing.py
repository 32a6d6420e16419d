"""A run starts the machines that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
from tests.data_prep.preflight.autoscaling import growing_cluster


@pytest.mark.slow
def test_a_head_without_cpus_starts_machines_for_a_run(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    world: list[str],
    codec_dir: Path,
    config: PrepareConfig,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Sockets have short names.
    with growing_cluster(tmp_path_factory.mktemp("r"), machine_cpus=4, machines=1) as address:
        ray.init(address=address, log_to_driver=False)
        try:
            assert ray.cluster_resources().get("CPU", 0) == 0
            report = prepare(config, world, tmp_path / "out", codec_dir)
            assert ray.cluster_resources()["CPU"] == 4
        finally:
            ray.shutdown()
    assert report.counts == {"kept": 11}
