"""Questions to the Ray that is connected: free CPUs, what may come, and who sees a local folder.

Knows nothing of samples, or of how one is made.

    NotShared(LedgerError)   a local folder that other machines of the cluster do not see
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._private.state import state as cluster_state  # Ray's own libraries ask it the same way
from ray.autoscaler.sdk import request_resources
from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep.config import ConcurrencyConfig
from data_prep.ledger.errors import LedgerError
from data_prep.resources import GROWING_CPUS, ResourceError, StageResources, plan_resources
from data_prep.storage.location import is_uri
from flowreel.values import sha256_of

log = logging.getLogger("flowreel.prepare")

FREEING_S = 30.0
"""How long a killed run may take to give its CPUs back, in seconds."""
STARTING_S = 900.0
"""How long a cluster may take to start machines for a run, in seconds."""
_READ_WHOLE_BYTES = 2**20
_NAMED = 3
"""So many machines are named in a message."""


class NotShared(LedgerError):
    """A local folder that not every machine of the cluster sees."""


class Capacity(NamedTuple):
    """What the connected cluster has to give."""

    cpus: float
    """Free now."""
    gpus: float
    """Free now."""
    total: float
    """CPUs that are there, free or not."""
    most_cpus: float
    """Free if the cluster grows as far as it may; `cpus` where it does not grow."""

    @property
    def grows(self) -> bool:
        """Whether machines may come, or must: a head without CPUs is of use only if they do."""
        return self.most_cpus > self.cpus or not self.total


def capacity(concurrency: ConcurrencyConfig) -> Capacity:
    """What the cluster has now, and may come to have by its autoscaler or by the settings."""
    free, there = ray.available_resources(), ray.cluster_resources()
    cpus, total = float(free.get("CPU", 0.0)), float(there.get("CPU", 0.0))
    reported = cluster_state.get_max_resources_from_cluster_config() or {}
    most = float(concurrency.grow_to_cpus or reported.get("CPU", 0))
    return Capacity(cpus, float(free.get("GPU", 0.0)), total, max(cpus, most - (total - cpus)))


def plan_on_cluster(
    concurrency: ConcurrencyConfig,
    encoder_threads: int,
    *,
    starting_s: float = STARTING_S,
    freeing_s: float = FREEING_S,
) -> tuple[float, dict[str, StageResources]]:
    """Free CPUs and the stages on them, as soon as they suffice.

    What a run killed just now still holds is waited for. A cluster that grows is asked for machines
    first, so that a head without CPUs and without workers starts a run.

    Raises:
        ResourceError: what is free does not hold the stages, and no more came in time.
    """
    began, asked = time.monotonic(), False
    try:
        while True:
            now = capacity(concurrency)
            waits_s = starting_s if now.grows else freeing_s
            is_late = time.monotonic() >= began + waits_s
            if now.grows and now.cpus < GROWING_CPUS and not is_late:
                if not asked:
                    _ask(concurrency)
                    asked = True
                time.sleep(0.5)
                continue
            try:
                plan = plan_resources(
                    now.cpus,
                    now.gpus,
                    concurrency,
                    encoder_threads=encoder_threads,
                    most_cpus=now.most_cpus,
                )
            except ResourceError as error:
                if is_late and asked:
                    raise ResourceError(
                        f"{error}. Machines were asked for; {waits_s:g} s later {now.cpus:g} CPUs "
                        "are free: look at `ray status`"
                    ) from error
                if is_late:
                    raise
            else:
                # A share of a busy cluster is enough to work on, but crumbs of an idle one mean
                # that a killed run still holds the rest.
                if is_late or now.cpus >= min(now.total, 1.0):
                    return now.cpus, plan
            time.sleep(0.5)
    finally:
        if asked:
            # From here on the pools' own actors ask for what they need.
            request_resources(num_cpus=0)


def _ask(concurrency: ConcurrencyConfig) -> None:
    """Ask the autoscaler, if there is one, for the least that a run begins with."""
    gpus = concurrency.encoder_gpus + concurrency.captioner_gpus
    bundles = [{"CPU": 1}] * math.ceil(GROWING_CPUS) + [{"GPU": 1}] * math.ceil(gpus)
    request_resources(bundles=bundles)
    log.warning(
        "the cluster is asked for %g CPUs%s; waiting for its machines",
        GROWING_CPUS,
        f" and {math.ceil(gpus)} GPUs" if gpus else "",
    )


def check_shared(paths: Iterable[str], what: str) -> None:
    """Hold local paths against what every machine of the cluster sees; URIs pass.

    Raises:
        NotShared: a machine does not see one of them; the message names machine and path.
    """
    local = tuple(path for path in paths if not is_uri(path))
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    if not local or len(nodes) < 2:
        return
    ask = ray.remote(num_cpus=0)(_unseen)
    identities = _identities(local)
    answers = {
        address: _on_node(ask, node).remote(local, identities) for node, address in nodes.items()
    }
    unseen = {}
    for address, answer in answers.items():
        # A machine that went away since it was listed has nothing to see.
        with contextlib.suppress(TaskUnschedulableError, NodeDiedError, WorkerCrashedError):
            unseen[address] = ray.get(answer)
    blind = [address for address, paths in unseen.items() if paths]
    if blind:
        others = f" and {len(blind) - _NAMED} more" if len(blind) > _NAMED else ""
        raise NotShared(
            f"{what} {unseen[blind[0]][0]} is a folder of this machine alone: "
            f"{', '.join(blind[:_NAMED])}{others} of the cluster's {len(nodes)} machines do not "
            "see it; use a folder that all of them mount, or a store such as s3://bucket/latents"
        )


def _on_node(task: ray.remote_function.RemoteFunction, node: str) -> Any:
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def _identities(paths: Sequence[str]) -> list[str]:
    """What tells a path from another of the same name, the same whichever machine looks.

    A small file's content: of a folder that is mounted, times and sizes may be some seconds old.
    """
    found = []
    for path in map(Path, paths):
        size_bytes = path.stat().st_size
        if path.is_dir():
            found.append("a folder")
        elif size_bytes <= _READ_WHOLE_BYTES:
            found.append(sha256_of(path))
        else:
            found.append(f"{size_bytes} bytes")
    return found


def _unseen(paths: Sequence[str], identities: Sequence[str]) -> list[str]:
    """Those of the paths that this machine does not have, or has otherwise."""
    return [
        path
        for path, identity in zip(paths, identities, strict=True)
        if not Path(path).exists() or _identities([path]) != [identity]
    ]
