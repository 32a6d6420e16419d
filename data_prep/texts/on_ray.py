"""Encoded prompts by encoders on the workers of a cluster: only the wiring.

An actor has an encoder and writes the whole file of a shard, the next one as soon as it is done.
With GPUs there is an actor for each; without, one on each machine, with all its CPUs. What an actor
does is `data_prep.texts.write`. The caller starts Ray. Knows nothing of captions.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util import ActorPool

from data_prep.ledger.locks import lock_writing
from data_prep.preflight.on_ray import check_shared
from data_prep.storage.store import open_folder
from data_prep.texts.records import SETTINGS_NAME, TextSettings
from data_prep.texts.write import ShardTexts, TextWriter
from flowreel.errors import FlowreelError

_ENDING_S = 10.0
"""How long the actors of a run that failed may take to end what they are writing, in seconds."""


class TextActor:
    """`TextWriter` in a process of its own; it holds the right to write itself.

    Args:
        out: the dataset, a path or URI.
        settings: encoder and forms.
        run: names the run, whose writers hold the right together.
    """

    _writer: TextWriter | None = None
    _error: FlowreelError | None = None

    def __init__(self, out: str, settings: TextSettings, run: str) -> None:
        self._lock = contextlib.ExitStack()
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        try:
            still_ours = self._lock.enter_context(lock_writing(open_folder(out), run))
            self._writer = TextWriter(out, settings, device, still_ours)
        except FlowreelError as error:
            # Of an error in a constructor Ray keeps only the text of its traceback, so this one is
            # raised at the first shard.
            self._error = error

    def write(self, shard: str) -> ShardTexts:
        """See `TextWriter.write`."""
        if self._error is not None:
            raise self._error
        assert self._writer is not None
        return self._writer.write(shard)

    def close(self) -> None:
        """Let go of the right to write."""
        self._lock.close()


def written_on_ray(out: str, settings: TextSettings, shards: list[str]) -> Iterator[ShardTexts]:
    """Write the files of shards on the workers of the cluster.

    An actor that is killed is started again, with the shard that it had.
    """
    check_shared([f"{out}/{SETTINGS_NAME}"], "--out")
    settings = _located(settings)
    run = uuid.uuid4().hex
    remote = ray.remote(TextActor).options(max_restarts=-1, max_task_retries=-1, **_share())
    actors = [remote.remote(out, settings, run) for _ in range(min(len(shards), _workers()))]
    pool = ActorPool(actors)
    try:
        yield from pool.map_unordered(lambda actor, shard: actor.write.remote(shard), shards)
        ray.get([actor.close.remote() for actor in actors])
    except BaseException as error:
        # Let go of first: in a store the right to write would outlive a killed process for a while.
        ends = [actor.close.remote() for actor in actors]
        ray.wait(ends, num_returns=len(ends), timeout=_ENDING_S)
        if isinstance(error, RayTaskError):
            # What went wrong in an actor comes out as it was raised there.
            raise error.cause from None
        raise
    finally:
        for actor in actors:
            ray.kill(actor)


def _located(settings: TextSettings) -> TextSettings:
    """The settings with a folder of weights made absolute: workers have other working folders."""
    spec = settings.encoder.spec
    if spec.path is None or not Path(spec.path).is_dir():
        return settings
    spec = replace(spec, path=str(Path(spec.path).absolute()))
    return replace(settings, encoder=replace(settings.encoder, spec=spec))


def _has_gpus() -> bool:
    return int(ray.cluster_resources().get("GPU", 0)) > 0


def _machine_cpus() -> list[int]:
    """CPUs of every machine that has some."""
    found = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return [int(cpus) for cpus in found if cpus >= 1]


def _workers() -> int:
    # GPUs that another job holds are not waited for: a shard would wait with them.
    free = int(ray.available_resources().get("GPU", 0)) if _has_gpus() else len(_machine_cpus())
    return max(1, free)


def _share() -> dict[str, Any]:
    """What Ray sets aside for an actor; torch computes on so many threads."""
    return {"num_gpus": 1, "num_cpus": 1} if _has_gpus() else {"num_cpus": min(_machine_cpus())}
