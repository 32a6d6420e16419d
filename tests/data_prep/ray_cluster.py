"""A Ray of two CPUs for tests, with workers that get their share of a busy machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

# Ray runs its workers at nice 15: beside anything else on two CPUs they would starve.
RAY_ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "240"}


@contextmanager
def running_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
