"""How many actors of each stage, and what share of a CPU each: decided before the run.

A pure policy of numbers, tested without a cluster. Ray Data fuses a reading task into an actor of
equal resources; the shares of reading and decoding differ, so every stage stays its own operator.

    ResourceError(ValueError)    the cluster cannot hold one actor of every stage
"""

from __future__ import annotations

from typing import NamedTuple

from data_prep.config import ConcurrencyConfig

_MIN_CPUS = 0.5
# Shares of a small machine, by where the time goes; they add up to 0.9.
_SMALL = {
    "read": 0.15, "decode": 0.25, "filter": 0.03, "caption": 0.12, "encode": 0.32, "sink": 0.03
}  # fmt: skip


class ResourceError(ValueError):
    """The stages do not fit the CPUs or GPUs that are free."""


class StageResources(NamedTuple):
    """Workers of one stage, and CPUs and GPUs of each."""

    workers: int
    cpus: float
    gpus: float = 0.0


def plan_resources(
    cpus: float, gpus: float, wanted: ConcurrencyConfig, *, encoder_threads: int = 1
) -> dict[str, StageResources]:
    """Workers and shares of the six stages that fit `cpus` and `gpus` together.

    Up to four CPUs every stage has one worker (unless asked) and a fixed share of the machine;
    above that decoders and encoders get whole CPUs and grow in number.

    Raises:
        ResourceError: less than half a CPU is free, or what was asked for does not fit.
    """
    if cpus < _MIN_CPUS:
        raise ResourceError(
            f"{cpus:g} CPUs are free; preparing needs at least {_MIN_CPUS:g}. "
            "Start Ray with more, or wait for other work to end"
        )
    shards = wanted.shards_in_flight
    if cpus <= 4:
        counts = {
            "read": shards,
            "filter": 1,
            "sink": 1,
            "decode": wanted.decoders or 1,
            "caption": wanted.captioners or 1,
            # An encoder for every core: encoding is the bulk, and what else runs takes its turn by time-sharing.
            "encode": wanted.encoders or (1 if wanted.encoder_gpus else max(1, int(cpus))),
        }
        plan = {
            stage: StageResources(counts[stage], _share(cpus * share / counts[stage]))
            for stage, share in _SMALL.items()
        }
    else:
        free = cpus - 0.3 * shards - 0.2
        captioners = wanted.captioners or (1 if wanted.captioner_gpus else max(1, int(free // 8)))
        left_gpus = gpus - captioners * wanted.captioner_gpus
        encoders = wanted.encoders or max(
            1, int(left_gpus // wanted.encoder_gpus) if wanted.encoder_gpus else int(free * 0.5)
        )
        threads = 1 if wanted.encoder_gpus else encoder_threads
        if not wanted.encoders and not wanted.encoder_gpus:
            encoders = max(1, encoders // threads)
        left = free - captioners * 0.5 - encoders * threads
        plan = {
            "read": StageResources(shards, 0.3),
            "decode": StageResources(wanted.decoders or max(1, int(left)), 1.0),
            "filter": StageResources(1, 0.1),
            "caption": StageResources(captioners, 0.5),
            "encode": StageResources(encoders, float(threads)),
            "sink": StageResources(1, 0.1),
        }
    if wanted.captioner_gpus:
        plan["caption"] = plan["caption"]._replace(gpus=wanted.captioner_gpus)
    if wanted.encoder_gpus:
        plan["encode"] = plan["encode"]._replace(gpus=wanted.encoder_gpus)
    _check(plan, cpus, gpus)
    return plan


def describe(plan: dict[str, StageResources], cpus: float) -> str:
    """One line for the log: what the preflight chose."""
    stages = ", ".join(
        f"{stage} {r.workers}×{r.cpus:g}" + (f" CPU {r.gpus:g} GPU" if r.gpus else "")
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
