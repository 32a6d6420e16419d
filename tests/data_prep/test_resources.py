"""Whatever the machine, the stages fit it or the refusal says why."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

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


def test_pools_of_large_machines_can_grow_to_use_them() -> None:
    plan = plan_resources(64, 0, ConcurrencyConfig())
    for stage in ("decode", "encode"):
        assert 10 < plan[stage].workers < plan[stage].most
        others = sum(r.workers * r.cpus for name, r in plan.items() if name != stage)
        # Where all the work is in one stage, its pool may take what the others do not begin with.
        assert others + plan[stage].most * plan[stage].cpus > 60


@pytest.mark.parametrize("cpus", [4, 8, 64])
def test_pools_begin_on_what_is_there_and_may_fill_what_the_cluster_becomes(cpus: float) -> None:
    now = plan_resources(cpus, 0, ConcurrencyConfig(), most_cpus=3200)
    grown = plan_resources(3200, 0, ConcurrencyConfig())
    assert sum(r.workers * r.cpus for r in now.values()) <= cpus
    for stage in ("read", "decode", "encode"):
        assert now[stage].most >= grown[stage].workers > now[stage].workers
        assert now[stage].cpus == grown[stage].cpus
    assert grown["read"].workers > 100


@pytest.mark.parametrize("cpus", [1, 2, 4, 8, 64])
def test_pools_keep_to_the_bounds_of_the_recipe(cpus: float) -> None:
    wanted = ConcurrencyConfig(decoders=(1, 3), encoders=2, captioners=(1, 2))
    plan = plan_resources(cpus, 0, wanted)
    assert (plan["decode"].workers, plan["decode"].most) == (1, 3)
    assert (plan["encode"].workers, plan["encode"].most) == (2, 0)
    assert (plan["caption"].workers, plan["caption"].most) == (1, 2)
    assert "decode 1–3×" in describe(plan, cpus)
    if cpus <= 4:
        assert sum(max(r.workers, r.most) * r.cpus for r in plan.values()) <= cpus


@pytest.mark.parametrize("pool", [0, (0, 2), (3, 2)])
def test_bounds_that_cannot_be_are_refused(pool: int | tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="1 ≤ least ≤ most"):
        ConcurrencyConfig(decoders=pool)


def test_sinks_grow_with_the_cluster_or_are_as_many_as_asked_for() -> None:
    counts = [plan_resources(n, 0, ConcurrencyConfig())["sink"].workers for n in (1, 8, 64, 6400)]
    assert counts == [1, 1, 4, 400]
    for cpus in (2, 64):
        assert plan_resources(cpus, 0, ConcurrencyConfig(sinks=3))["sink"].workers == 3


def test_gpus_set_the_number_of_encoders() -> None:
    plan = plan_resources(32, 4, ConcurrencyConfig(encoder_gpus=0.5))
    assert plan["encode"] == (8, 1.0, 0.5, 0)


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
