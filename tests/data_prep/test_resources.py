"""Whatever the machine, the stages fit it or the refusal says why."""

from __future__ import annotations

import pytest

from data_prep.config import ConcurrencyConfig
from data_prep.resources import ResourceError, describe, plan_resources


@pytest.mark.parametrize("cpus", [0.5, 1, 2, 3, 4, 5, 8, 16, 64, 384])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_stages_fit_any_machine(cpus: float, shards: int) -> None:
    plan = plan_resources(cpus, 0, ConcurrencyConfig(shards_in_flight=shards))
    assert sum(r.workers * r.cpus for r in plan.values()) <= cpus
    assert all(r.workers >= 1 and r.cpus > 0 for r in plan.values())
    # Otherwise Ray Data would fuse reading into the decoders.
    assert plan["read"].cpus != plan["decode"].cpus
    assert f"of {cpus:g} CPUs" in describe(plan, cpus)


def test_large_machines_are_used() -> None:
    plan = plan_resources(64, 0, ConcurrencyConfig())
    assert sum(r.workers * r.cpus for r in plan.values()) > 60
    assert plan["decode"].workers > 10
    assert plan["encode"].workers > 10


def test_gpus_set_the_number_of_encoders() -> None:
    plan = plan_resources(32, 4, ConcurrencyConfig(encoder_gpus=0.5))
    assert plan["encode"] == (8, 1.0, 0.5)


@pytest.mark.parametrize(
    ("cpus", "wanted", "words"),
    [
        (0.2, ConcurrencyConfig(), "0.2 CPUs are free"),
        (8, ConcurrencyConfig(decoders=50), "lower concurrency"),
        (8, ConcurrencyConfig(encoder_gpus=1.0), "1 GPUS and 0 are free"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(
    cpus: float, wanted: ConcurrencyConfig, words: str
) -> None:
    with pytest.raises(ResourceError, match=words):
        plan_resources(cpus, 0, wanted)
