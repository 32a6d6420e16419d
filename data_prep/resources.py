"""How many actors each stage has, and what share of a CPU each takes: decided before the run.

A pure policy of numbers, tested without a cluster. Ray Data fuses a reading task into an actor of
equal resources; the shares of reading and decoding differ, so every stage stays its own operator.
Knows nothing of Ray.

    ResourceError(FlowreelError, ValueError)   the cluster cannot hold one actor of every stage
"""

from __future__ import annotations

from typing import NamedTuple

from data_prep.config import ConcurrencyConfig, bounds
from flowreel.errors import FlowreelError

_MIN_CPUS = 0.5
GROWING_CPUS = 4.0
"""A cluster that grows is waited for until so many CPUs are free: enough for one worker of each
stage with whole CPUs for those that decode and encode."""
_CPUS_PER_SHARD = 8
"""Reading one shard feeds about so many decoders."""
_SMALL = {
    "read": 0.15, "decode": 0.28, "caption": 0.12, "encode": 0.32, "sink": 0.03
}  # fmt: skip
"""Shares of a small machine, by where the time goes; they add up to 0.9."""
_CPUS_PER_SINK = 16
"""A sink writes what so many CPUs make, with much to spare."""


class ResourceError(FlowreelError, ValueError):
    """The stages do not fit the CPUs or GPUs that are free."""


class StageResources(NamedTuple):
    """Workers of one stage, and CPUs and GPUs of each."""

    workers: int
    """How many there are at the start, and at least."""
    cpus: float
    gpus: float = 0.0
    most: int = 0
    """How many there may be where CPUs are free; 0: the pool does not grow."""


def plan_resources(
    cpus: float,
    gpus: float,
    concurrency: ConcurrencyConfig,
    *,
    encoder_threads: int = 1,
    most_cpus: float = 0.0,
) -> dict[str, StageResources]:
    """Workers and shares of the five operators that fit `cpus` and `gpus` together.

    Up to four CPUs, every stage has one worker (unless more are asked for) and a fixed share of the
    machine, which its workers divide among them: all of them fit at once. Above that, decoders and
    encoders get whole CPUs, and their pools grow and shrink with the work. What the pools begin
    with fits beside everything else, so no stage ever waits for another's CPUs.

    Where the cluster may grow, to `most_cpus` free ones, pools begin as the CPUs that are there
    allow and may grow as large as they would be there.

    >>> plan = plan_resources(2, 0, ConcurrencyConfig())
    >>> plan["decode"]
    StageResources(workers=1, cpus=0.56, gpus=0.0, most=0)

    Raises:
        ResourceError: less than half a CPU is free, or what was asked for does not fit.
    """
    if cpus < _MIN_CPUS:
        raise ResourceError(
            f"{cpus:g} CPUs are free; preparing needs at least {_MIN_CPUS:g}. "
            "Start Ray with more, or wait for other work to end"
        )
    if cpus <= 4 and most_cpus <= 4:
        plan = _small(cpus, concurrency)
    else:
        plan = _large(cpus, gpus, concurrency, encoder_threads)
    if most_cpus > max(cpus, 4):
        plan = _growing(plan, _large(most_cpus, gpus, concurrency, encoder_threads))
    if concurrency.captioner_gpus:
        plan["caption"] = plan["caption"]._replace(gpus=concurrency.captioner_gpus)
    if concurrency.encoder_gpus:
        plan["encode"] = plan["encode"]._replace(gpus=concurrency.encoder_gpus)
    _check(plan, cpus, gpus)
    return plan


def _small(cpus: float, concurrency: ConcurrencyConfig) -> dict[str, StageResources]:
    """Shares of a machine of up to four CPUs."""
    shards = concurrency.shards_in_flight or _shards(cpus)
    # One encoder for every core: encoding is the bulk of the work, and the other stages run in
    # between, as the system divides its time.
    encoders = 1 if concurrency.encoder_gpus else max(1, int(cpus))
    pools = {
        "read": (shards, shards),
        "sink": (concurrency.sinks or 1,) * 2,
        "decode": bounds(concurrency.decoders) or (1, 1),
        "caption": bounds(concurrency.captioners) or (1, 1),
        "encode": bounds(concurrency.encoders) or (encoders, encoders),
    }
    return {
        stage: _pool(pools[stage], _share(cpus * share / pools[stage][1]))
        for stage, share in _SMALL.items()
    }


def _large(
    cpus: float, gpus: float, concurrency: ConcurrencyConfig, encoder_threads: int
) -> dict[str, StageResources]:
    """Whole CPUs for decoders and encoders; pools that nobody sized go from half to double."""
    shards = concurrency.shards_in_flight or _shards(cpus)
    sinks = concurrency.sinks or max(1, int(cpus // _CPUS_PER_SINK))
    free = cpus - 0.3 * shards - 0.1 * sinks
    threads = 1 if concurrency.encoder_gpus else encoder_threads
    pools = {
        "decode": bounds(concurrency.decoders),
        "caption": bounds(concurrency.captioners),
        "encode": bounds(concurrency.encoders),
    }
    if concurrency.captioner_gpus and pools["caption"] is None:
        pools["caption"] = (1, 1)
    captioners = (pools["caption"] or (max(1, int(free // 8)),))[0]
    if concurrency.encoder_gpus and pools["encode"] is None:
        left_gpus = gpus - captioners * concurrency.captioner_gpus
        by_gpu = max(1, int(left_gpus // concurrency.encoder_gpus))
        pools["encode"] = (by_gpu, by_gpu)
    encoders = (pools["encode"] or (max(1, int(free * 0.5) // threads),))[0]
    decoders = max(1, int(free - captioners * 0.5 - encoders * threads))
    return {
        "read": StageResources(shards, 0.3),
        "decode": _pool(pools["decode"] or _around(decoders), 1.0),
        "caption": _pool(pools["caption"] or _around(captioners), 0.5),
        "encode": _pool(pools["encode"] or _around(encoders), float(threads)),
        "sink": StageResources(sinks, 0.1),
    }


def _shards(cpus: float) -> int:
    """How many shards are read at once on so many CPUs.

    >>> [_shards(cpus) for cpus in (2, 16, 64, 3200)]
    [2, 2, 8, 400]
    """
    return max(2, int(cpus // _CPUS_PER_SHARD))


def _growing(
    now: dict[str, StageResources], later: dict[str, StageResources]
) -> dict[str, StageResources]:
    """Pools of today that may become as large as those of the grown cluster."""
    plan = {}
    for stage, need in now.items():
        most = max(need.most, later[stage].workers, later[stage].most)
        plan[stage] = need._replace(most=most if most > need.workers else 0)
    return plan


def _around(workers: int) -> tuple[int, int]:
    """From half of so many workers to twice as many."""
    return max(1, workers // 2), workers * 2


def _pool(workers: tuple[int, int], cpus: float) -> StageResources:
    least, most = workers
    return StageResources(least, cpus, most=most if most > least else 0)


def needed_concurrency(
    concurrency: ConcurrencyConfig, *, vllm_gpus: int | None, encodes: bool
) -> ConcurrencyConfig:
    """The concurrency to plan for, given the captioner and whether anything is encoded.

    Args:
        concurrency: the settings.
        vllm_gpus: GPUs of one vLLM engine; None where another captioner writes.
        encodes: whether a shard needs latents.
    """
    if vllm_gpus is not None:
        concurrency = concurrency.model_copy(update={"captioner_gpus": float(vllm_gpus)})
    if not encodes:
        concurrency = concurrency.model_copy(update={"encoders": 1, "encoder_gpus": 0.0})
    return concurrency


def describe(plan: dict[str, StageResources], cpus: float) -> str:
    """One line for the log: what the preflight chose."""
    stages = ", ".join(
        f"{stage} {r.workers}{f'–{r.most}' if r.most else ''}×{r.cpus:g}"
        + (f" CPU {r.gpus:g} GPU" if r.gpus else "")
        for stage, r in plan.items()
    )
    total = sum(r.workers * r.cpus for r in plan.values())
    return f"{total:.2f} of {cpus:g} CPUs: {stages}"


def _share(cpus: float) -> float:
    # Ray counts CPUs in ten-thousandths; rounding down keeps the sum under the machine.
    return max(0.001, int(cpus * 1000) / 1000)


def _check(plan: dict[str, StageResources], cpus: float, gpus: float) -> None:
    for unit, free in (("cpus", cpus), ("gpus", gpus)):
        need = sum(r.workers * getattr(r, unit) for r in plan.values())
        if need > free + 1e-9:
            raise ResourceError(
                f"the stages need {need:g} {unit.upper()} and {free:g} are free "
                f"({describe(plan, cpus)}); lower concurrency.* or enlarge the cluster"
            )
