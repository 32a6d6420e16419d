"""The sink as an operator of Ray Data: only the wiring. What it does is `data_prep.ledger.sink`.

Knows nothing of how a sample is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pyarrow as pa

from data_prep.config import PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.ledger.locks import lock_writing
from data_prep.ledger.sink import SinkStage
from data_prep.row import split_windows
from data_prep.storage.store import open_folder

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


class Sink:
    """`SinkStage` as the run's only writer; it gives a receipt for every row.

    It holds the right to write itself: if its run is killed, it may live on for a moment.
    """

    def __init__(self, config: PrepareConfig, out: str, jobs: tuple[ShardJob, ...]) -> None:
        self._lock = contextlib.ExitStack()
        still_ours = self._lock.enter_context(lock_writing(open_folder(out)))
        self._stage = SinkStage(config, out, jobs, still_ours)

    def __del__(self) -> None:
        # Ray deletes an operator that ends in peace; a killed one's lock ends with its process.
        self._lock.close()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        receipts = []
        for row in batch.to_pylist():
            receipt = {name: row[name] for name in ("shard", "number", "status", "reason")}
            receipt["reused"] = any(part["reused"] for part in split_windows(row))
            receipt["committed"] = self._stage.accept(row)
            receipts.append(receipt)
        yield pa.Table.from_pylist(receipts, schema=_RECEIPT_SCHEMA)
