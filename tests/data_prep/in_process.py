"""The stages of `prepare` in one process, in any order and up to any point: Ray, only slower."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.captions.stage import CaptionStage
from data_prep.clips.decode import DecodeStage
from data_prep.config import PrepareConfig
from data_prep.latents.encode import EncodeStage
from data_prep.ledger.locks import lock_output, lock_writing
from data_prep.ledger.recaption import numbers_to_skip
from data_prep.ledger.reuse import Reuse
from data_prep.ledger.sink import SinkStage
from data_prep.ledger.staging import Staging
from data_prep.row import ROW_SCHEMA, Row, table_of
from data_prep.run import (
    PrepareReport,
    RunFigures,
    RunPlan,
    finish_run,
    plan_caption_run,
    plan_run,
    report_of,
)
from data_prep.stages import FilterStage, Stage, read_rows, run_stage
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder


def finished_rows(plan: RunPlan, config: PrepareConfig) -> Iterator[Row]:
    """Every row of the plan after all stages but the sink."""
    skip = frozenset(job.name for job in plan.jobs if not job.encode)
    reuse = Reuse(plan.out, plan.jobs)
    stages: list[Stage] = [
        DecodeStage(config, plan.sizes, reuse=reuse),
        FilterStage(config, reuse),
        CaptionStage(config),
    ]
    if plan.codec:
        stages.append(EncodeStage(config, plan.codec, skip))
    staging = Staging(open_folder(plan.out))
    try:
        for job in plan.jobs:
            for row in read_rows(job, config, numbers_to_skip(staging, job)):
                for stage in stages:
                    row = run_stage(stage, row)
                yield row
    finally:
        for stage in stages:
            stage.close()


def decode_row(**values: Any) -> Row:
    """A row of a video as the decoding stage takes it."""
    row = dict.fromkeys(ROW_SCHEMA.names)
    return {**row, "status": "", "number": 0, "shard": "s", "key": "k", "window": 0, "note": "",
            "suffix": "mp4", "media": b"1", "metadata": "{}", **values}  # fmt: skip


def prepare_locally(
    config: PrepareConfig,
    shards: list[str],
    out: Location,
    codec: Path,
    *,
    shuffle: int | None = None,
    stop_after: int | None = None,
    redo: bool = False,
) -> PrepareReport:
    """Like `prepare`, in this process: rows shuffled by a seed, or stopped after so many."""
    with lock_output(open_folder(out)):
        plan = plan_run(config, shards, out, str(codec), redo=redo)
        return _run(plan, config, shuffle, stop_after)


def caption_locally(
    config: PrepareConfig,
    shards: list[str] | None,
    out: Location,
    *,
    shuffle: int | None = None,
    stop_after: int | None = None,
) -> PrepareReport:
    """Like `prepare` with `only="captions"`, in this process."""
    with lock_output(open_folder(out)):
        return _run(plan_caption_run(config, shards, out), config, shuffle, stop_after)


def _run(
    plan: RunPlan, config: PrepareConfig, shuffle: int | None, stop_after: int | None
) -> PrepareReport:
    with lock_writing(open_folder(plan.out)) as still_ours:
        sink = SinkStage(config, plan.out, plan.jobs, still_ours)
        rows = list(finished_rows(plan, config))
        if shuffle is not None:
            random.Random(shuffle).shuffle(rows)
        for row in rows[:stop_after]:
            sink.accept(table_of([row]))
    finish_run(plan, config)
    return report_of(plan, RunFigures(samples=len(rows), seconds=1.0))


def digests(out: Path) -> dict[str, str]:
    """Hash of every file of an output but the locks."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }
