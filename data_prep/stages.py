"""The stages that a sample passes, in order, as plain classes. This file is their common story.

    read_rows     rows of a shard that are not staged yet, then one closing row with their count
    DecodeStage   media → frames, cut to the bucket            `data_prep.clips.decode`
    FilterStage   drops by what only the decoder found         here
    CaptionStage  frames → synthetic caption                   `data_prep.captions.stage`
    EncodeStage   frames → posterior moments                   `data_prep.latents.encode`
    SinkStage     rows → staged samples → finished shards      `data_prep.ledger.sink`

A row is a dict of ROW_SCHEMA (`data_prep.row`). Its `status` is empty while the sample goes on. A
stage that decides sets the status with a reason and drops the payload, and later stages pass the
row through: every sample ends in exactly one status row, whatever is raised. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Generator
from dataclasses import asdict
from typing import Protocol

from data_prep.captions.captioner import CaptionerUnavailable
from data_prep.clips.cut import Bars
from data_prep.clips.filters import absent_fields, judge_pixels, judge_source
from data_prep.clips.windows import ClipTooShort
from data_prep.config import PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.ledger.reuse import Reuse
from data_prep.row import (
    ROW_SCHEMA,
    Row,
    decided,
    frames_of,
    is_closing,
    join_windows,
    split_windows,
)
from data_prep.sources.archive import Archive
from data_prep.sources.samples import Sample, ShardSummary, read_shard
from data_prep.storage.location import StorageError
from media.errors import MediaError

log = logging.getLogger("flowreel.prepare")


class Stage(Protocol):
    """A step of the pipeline."""

    def process(self, row: Row) -> Row:
        """The row after this step. What it raises becomes a status (`run_stage`)."""
        ...

    def close(self) -> None:
        """Let go of what the stage holds, such as processes and connections."""
        ...


def run_stage(stage: Stage, row: Row) -> Row:
    """One sample through one stage, window by window; what is raised becomes a status."""
    if row["status"] or is_closing(row):
        return row
    return join_windows([_run_window(stage, part) for part in split_windows(row)])


def _run_window(stage: Stage, row: Row) -> Row:
    if row["status"]:
        return row
    try:
        return stage.process(row)
    except (MediaError, ClipTooShort) as error:
        return decided(row, "failed", error.reason, str(error))
    except (CaptionerUnavailable, StorageError):  # no fault of the sample's: the run stops
        raise
    except Exception as error:  # a sample must not take its block with it; it is counted instead
        name = f"{row['shard']}/{row['key']}"
        log.warning("%s failed in %s", name, type(stage).__name__, exc_info=True)
        return decided(row, "failed", "internal_error", f"{type(error).__name__}: {error}")


class StageChain:
    """Stages one after another, as one; each sees a sample window by window, as if it were alone.

    >>> class Note:
    ...     def __init__(self, word): self.word = word
    ...     def process(self, row): return {**row, "note": row["note"] + self.word}
    ...     def close(self): pass
    >>> chain = StageChain(Note("decoded, "), Note("filtered"))
    >>> run_stage(chain, {"status": "", "number": 0, "note": ""})["note"]
    'decoded, filtered'
    """

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages

    def process(self, row: Row) -> Row:
        """The row after all of them."""
        for stage in self.stages:
            row = run_stage(stage, row)
        return row

    def close(self) -> None:
        """Close all of them."""
        for stage in self.stages:
            stage.close()


def read_rows(
    job: ShardJob, config: PrepareConfig, skip: set[int], archive: Archive | None = None
) -> Generator[Row, None, None]:
    """Rows of a shard's samples, in order, then the closing row.

    Args:
        job: the shard.
        config: the settings.
        skip: numbers of the samples that need no row, because they are staged.
        archive: the shard, where it is open already.

    Raises:
        ShardError: the shard cannot be opened.
        StorageError: the disk or store fails.
    """
    summary = ShardSummary()
    empty = dict.fromkeys(ROW_SCHEMA.names)
    samples = read_shard(
        job.source,
        max_media_bytes=config.caps.max_media_bytes,
        summary=summary,
        config=config.source,
        archive=archive,
    )
    unjudged: Counter[str] = Counter()
    for sample in samples:
        # Counted of staged samples too, so that a resumed run counts what an undisturbed one does.
        unjudged.update(_unjudged(sample, config))
        if sample.number in skip:
            continue
        row = {
            **empty,
            "shard": job.name,
            "number": sample.number,
            "key": sample.key,
            "window": 0,
            "status": "",
            "reason": "",
            "detail": "",
            "note": sample.note,
            "media": sample.media,
            "suffix": sample.suffix,
            "metadata": json.dumps(sample.metadata, default=str),
            "caption": sample.caption,
        }
        row["source_digest"] = _digest_of_sample(row)
        if sample.problem:
            row = decided(row, "failed", sample.problem, sample.detail)
        elif sample.is_image and not config.images:
            row = decided(row, "dropped", "image", "this run takes no images")
        yield row
    summary.unjudged = dict(sorted(unjudged.items()))
    closing = {"shard": job.name, "number": -1, "key": "", "status": ""}
    yield {**empty, **closing, "closing": json.dumps(asdict(summary))}


def _unjudged(sample: Sample, config: PrepareConfig) -> list[str]:
    """What a sample adds to `Manifest.unjudged`."""
    filters = config.filters
    if sample.problem or (sample.is_image and not config.images):
        return []  # it does not come to the filters
    absent = absent_fields(sample.metadata, filters) if filters.missing_metadata == "keep" else []
    return ["samples", *absent]


def _digest_of_sample(row: Row) -> str:
    """SHA-256 of everything about a sample that decides what becomes of it, given the settings."""
    values = [row[name] for name in ("key", "suffix", "metadata", "caption", "note")]
    digest = hashlib.sha256(json.dumps(values).encode())
    digest.update(row["media"] or b"")
    return digest.hexdigest()


class FilterStage:
    """Drops by what only the decoder knew: area and length of the source, and the pixels.

    A window that passes takes along the latents and the caption that stand for the same frames.

    >>> from data_prep.config import FilterConfig
    >>> stage = FilterStage(PrepareConfig(filters=FilterConfig(min_area_pixels=100)))
    >>> source = {"source_height": 8, "source_width": 8, "duration_s": None}
    >>> frames = {"bars": [0] * 4, "frames": bytes(192), "frames_shape": [1, 8, 8, 3]}
    >>> row = stage.process({**source, **frames})
    >>> row["status"], row["reason"]
    ('dropped', 'small_area')
    """

    def __init__(self, config: PrepareConfig, reuse: Reuse | None = None) -> None:
        self.config = config
        self.reuse = reuse or Reuse()

    def process(self, row: Row) -> Row:
        """The row, dropped where a filter fails it. The area counts without black bars."""
        height, width = Bars(*row["bars"]).size_inside(row["source_height"], row["source_width"])
        filters = self.config.filters
        drop = judge_source(height, width, row["duration_s"], filters)
        drop = drop or judge_pixels(frames_of(row), filters)
        if drop is not None:
            return decided(row, "dropped", drop.reason, drop.detail)
        return self.reuse.fill(row)

    def close(self) -> None:
        """Do nothing: it holds nothing."""
