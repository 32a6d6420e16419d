"""The sinks as actors, and the operator of Ray Data that hands them their rows: only the wiring.

    block of rows → Sink (operator) → its part to the SinkActor of each shard → receipts

A shard has exactly one sink, by a hash of its name. Blocks pass through the object store as Arrow
tables. What a sink does is `data_prep.ledger.sink`. Knows nothing of how a sample is made.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from threading import Condition
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep.config import PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.ledger.locks import lock_writing
from data_prep.ledger.sink import SinkStage, sink_of
from data_prep.liveness import RayEnded
from data_prep.row import window_tables
from data_prep.storage.store import open_folder
from flowreel.errors import FlowreelError

_RECEIPT_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("number", pa.int32()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("reused", pa.bool_()),
        pa.field("committed", pa.bool_()),  # whether the row completed its shard
    ]
)
"""What the sink says of every row that it took."""
_UNUSED = ("media", "frames", "metadata")
"""Columns that no sink reads; where nothing is encoded, frames come as far as here."""
_ENDING_S = 10.0
"""How long the sinks of a run that failed may take to end what they are writing, in seconds."""


def blocks_in_flight(out: str) -> int:
    """Blocks that one sink writes at once: in a store a PUT is waited for."""
    return max(2, open_folder(out).threads // 2)


class SinkActor:
    """`SinkStage` for the shards of one sink; it gives a receipt for every row.

    It holds the right to write itself: if its run is killed, it may live on for a moment. Several
    threads call it.

    Args:
        config: the settings.
        out: the output, a path or URI.
        jobs: those of its shards.
        run: names the run, whose sinks hold the right to write together.
    """

    _stage: SinkStage | None = None
    _error: FlowreelError | None = None

    def __init__(self, config: PrepareConfig, out: str, jobs: Sequence[ShardJob], run: str) -> None:
        self._lock = contextlib.ExitStack()
        self._changed = Condition()
        self._at_work = 0
        self._is_closed = False
        try:
            still_ours = self._lock.enter_context(lock_writing(open_folder(out), run))
            self._stage = SinkStage(config, out, jobs, still_ours)
        except FlowreelError as error:
            # Of an error in a constructor Ray keeps only the text of its traceback, so this one is
            # raised at the first block.
            self._error = error

    def accept(self, block: pa.Table) -> pa.Table:
        """Take a block of rows of this sink's shards; their receipts."""
        if self._error is not None:
            raise self._error
        assert self._stage is not None
        with self._changed:
            assert not self._is_closed, "a sink was closed before its run had ended"
            self._at_work += 1
        try:
            return _receipts(block, self._stage.accept(block))
        finally:
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let go of the right to write, once nothing is being written."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._at_work)
        self._lock.close()


def _receipts(block: pa.Table, committed: set[str]) -> pa.Table:
    """A receipt for every row; the last one of a shard says that it is committed."""
    columns = ("shard", "number", "status", "reason")
    shards = block["shard"].to_pylist()
    last = {shard: at for at, shard in enumerate(shards)}
    values: dict[str, Any] = {name: block[name] for name in columns}
    values["reused"] = [_is_reused(block, at) for at in range(len(block))]
    values["committed"] = [
        shard in committed and last[shard] == at for at, shard in enumerate(shards)
    ]
    return pa.table(values).cast(_RECEIPT_SCHEMA)


def _is_reused(block: pa.Table, at: int) -> bool:
    """Whether a row, or a window of a carrier, has its latents or verdict of an earlier run."""
    windows = window_tables(block, at) or [block.slice(at, 1)]
    return any(any(window["reused"].to_pylist()) for window in windows)


@contextlib.contextmanager
def running_sinks(
    config: PrepareConfig, out: str, jobs: Sequence[ShardJob], sinks: int
) -> Iterator[list[Any]]:
    """The sinks of a run, as handles of actors; on leaving they end and let go of the output.

    A sink that is killed is started again, and is given anew what it had not finished.
    """
    run = uuid.uuid4().hex
    parts: list[list[ShardJob]] = [[] for _ in range(sinks)]
    for job in jobs:
        parts[sink_of(job.name, sinks)].append(job)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _has_cpus(node)]
    # Held here: a sink that is started again needs its jobs again.
    held = [ray.put(tuple(part)) for part in parts]
    actors = []
    for number, own in enumerate(held):
        where = "SPREAD"
        if nodes:
            node = nodes[number % len(nodes)]
            where = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
        # The operator that hands them their rows has their share of a CPU, so that Ray Data knows
        # what is taken.
        remote = ray.remote(SinkActor).options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2 * blocks_in_flight(out) + 1,
            scheduling_strategy=where,
        )
        actors.append(remote.remote(config, out, own, run))
    try:
        yield actors
        ray.get([actor.close.remote() for actor in actors])
    except RayEnded:
        # Nobody is left who would answer, and to ask would take longer than Ray lets us live.
        raise
    except BaseException:
        ends = [actor.close.remote() for actor in actors]
        ray.wait(ends, num_returns=len(ends), timeout=_ENDING_S)
        _end(actors)
        raise
    _end(actors)


def _end(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _has_cpus(node: dict[str, Any]) -> bool:
    return float(node["Resources"].get("CPU", 0.0)) > 0


class Sink:
    """Hands every row of a block to the sink of its shard; the receipts come out.

    Args:
        sinks: handles of the actors, in the order of their numbers.
    """

    def __init__(self, sinks: Sequence[Any]) -> None:
        self._sinks = list(sinks)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        names = [name for name in batch.column_names if name not in _UNUSED]
        block = batch.select(names)
        places: dict[int, list[int]] = {}
        for at, shard in enumerate(block["shard"].to_pylist()):
            places.setdefault(sink_of(shard, len(self._sinks)), []).append(at)
        receipts = []
        for number, own in places.items():
            # Most blocks are of one shard, and pass as they are.
            part = block if len(own) == len(block) else _rows_at(block, own)
            receipts.append(self._sinks[number].accept.remote(part))
        try:
            yield pa.concat_tables(ray.get(receipts))
        except RayTaskError as error:
            # What went wrong in a sink comes out as it was raised there.
            raise error.cause from None


def _rows_at(block: pa.Table, places: Sequence[int]) -> pa.Table:
    """Some rows of a block; slices, because to take rows would copy their moments twice."""
    return pa.concat_tables([block.slice(at, 1) for at in places])
