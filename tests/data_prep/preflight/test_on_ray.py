"""A cluster is asked for what it may become, and who sees a folder is known before work begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from data_prep.config import ConcurrencyConfig
from data_prep.preflight.on_ray import NotShared, capacity, check_shared, plan_on_cluster
from data_prep.resources import ResourceError
from tests.data_prep.ray_cluster import RAY_ENVIRONMENT


@pytest.fixture(scope="module")
def two_machines() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_folder_that_other_machines_do_not_see_is_refused_by_name(
    two_machines: None, tmp_path: Path
) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    check_shared([str(tmp_path), str(tmp_path / "dataset.json"), "s3://bucket/out"], "--out")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        # A path that only this process can follow.
        mine = f"/proc/self/fd/{folder}/dataset.json"
        with pytest.raises(NotShared, match=r"--out /proc/self/fd/\d+/dataset.json .* s3://bucket"):
            check_shared([mine], "--out")
    finally:
        os.close(folder)


@pytest.mark.slow
def test_the_cpus_of_all_machines_are_planned_on(two_machines: None) -> None:
    assert capacity(ConcurrencyConfig())[:3] == (2.0, 0.0, 2.0)
    assert not capacity(ConcurrencyConfig()).grows
    assert capacity(ConcurrencyConfig(grow_to_cpus=64)).most_cpus == 64.0
    wanted = ConcurrencyConfig(grow_to_cpus=64, decoders=3)
    with pytest.raises(ResourceError, match="Machines were asked for; 1 s later 2 CPUs are free"):
        plan_on_cluster(wanted, 1, starting_s=1.0)
