"""The stages a sample passes: decode → filter → caption → encode, as plain classes.

    read_rows     rows of a shard that are not staged yet, and one closing row with their count
    DecodeStage   bytes → frames of one window, cut to the bucket (metadata is judged before)
    FilterStage   drops by what the decoder found
    CaptionStage  frames → synthetic caption
    EncodeStage   frames → posterior moments, fp16
    SinkStage     rows → staged samples → finished shards

A row is a dict of ROW_SCHEMA (`data_prep.row`). `status` is empty while a sample goes on; a stage that
decides sets it with a reason and drops the payload, and later stages pass the row through: every
sample ends in exactly one status row, whatever is raised. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np

from data_prep.captions.captioner import CaptionerUnavailable, Written
from data_prep.captions.choose import build_captioner
from data_prep.clips.cut import Bars, ClipTooShort
from data_prep.clips.decode import DecodeStage
from data_prep.clips.filters import judge_pixels, judge_source
from data_prep.config import PrepareConfig
from data_prep.latents.duplicates import perceptual_hash
from data_prep.latents.records import Bucket, LatentRecord
from data_prep.ledger.job import ShardJob
from data_prep.ledger.ledger import Ledger
from data_prep.ledger.recaption import commit_captions_if_complete
from data_prep.ledger.reuse import Reuse
from data_prep.row import (
    PAYLOAD,
    ROW_SCHEMA,
    Row,
    decided,
    frames_of,
    join_windows,
    split_windows,
)
from data_prep.sources.samples import ShardSummary, read_shard
from data_prep.storage.location import Location, StorageError
from media.errors import MediaError

__all__ = [
    "PAYLOAD",
    "ROW_SCHEMA",
    "CaptionStage",
    "DecodeStage",
    "EncodeStage",
    "FilterStage",
    "Row",
    "SinkStage",
    "Stage",
    "read_rows",
    "run_stage",
    "with_caption",
]

log = logging.getLogger("flowreel.prepare")


class Stage(Protocol):
    """A step of the pipeline. `process` may raise: `run_stage` makes a status of it."""

    def process(self, row: Row) -> Row:
        """The row after this step."""
        ...

    def close(self) -> None:
        """Let go of what the stage holds."""
        ...


def run_stage(stage: Stage, row: Row) -> Row:
    """One sample through one stage, window by window; what is raised becomes a status."""
    if row["status"] or row["number"] < 0:
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


def read_rows(job: ShardJob, config: PrepareConfig, staged: set[int]) -> Iterator[Row]:
    """Rows of the samples that are not staged, in order, then the closing row."""
    summary = ShardSummary()
    empty = dict.fromkeys(ROW_SCHEMA.names)
    samples = read_shard(job.source, max_media_bytes=config.caps.max_media_bytes, summary=summary)
    for sample in samples:
        if sample.number in staged:
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
    closing = {"shard": job.name, "number": -1, "key": "", "status": ""}
    yield {**empty, **closing, "closing": json.dumps(asdict(summary))}


def _digest_of_sample(row: Row) -> str:
    """SHA-256 of everything about a sample that decides what becomes of it, given the settings."""
    said = [row[name] for name in ("key", "suffix", "metadata", "caption", "note")]
    digest = hashlib.sha256(json.dumps(said).encode())
    digest.update(row["media"] or b"")
    return digest.hexdigest()


class FilterStage:
    """Drops by what only the decoder knew: area and length of the source, and the pixels.

    What passes takes along the latents and the caption that stand for its frames.
    """

    def __init__(self, config: PrepareConfig, reuse: Reuse | None = None) -> None:
        self.config = config
        self.reuse = reuse or Reuse()

    def process(self, row: Row) -> Row:
        """The row, dropped where a filter fails it. Area counts without bars."""
        height, width = Bars(*row["bars"]).size_inside(row["source_height"], row["source_width"])
        filters = self.config.filters
        drop = judge_source(height, width, row["duration_s"], filters)
        drop = drop or judge_pixels(frames_of(row), filters)
        if drop is not None:
            return decided(row, "dropped", drop.reason, drop.detail)
        return self.reuse.fill(row)

    def close(self) -> None:
        """Holds nothing."""


class CaptionStage:
    """Frames → synthetic caption; the original one stays.

    A clip that cannot be captioned goes on without, its error recorded; it is captioned by a later
    `--only captions`. Where many in a row fail, it is not the clips: the run stops.
    """

    def __init__(self, config: PrepareConfig, device: str = "cpu") -> None:
        self.captioner = build_captioner(config.captioner, device, seed=config.seed)
        self.give_up_after = config.captioner.give_up_after
        self.failed_in_row = 0

    def process(self, row: Row) -> Row:
        """Fills `synthetic`, who wrote it, and `caption_error`."""
        return self.process_all([row])[0]

    def process_all(self, rows: Sequence[Row]) -> list[Row]:
        """The same for several rows at once; decided and closing rows pass through.

        Raises:
            CaptionerUnavailable: `give_up_after` clips in a row got no caption.
        """
        samples = [split_windows(row) for row in rows]
        waiting = [part for parts in samples for part in parts if _wants_caption(part)]
        written = iter(self._written([frames_of(part) for part in waiting]))
        filled = []
        for parts in samples:
            for place, part in enumerate(parts):
                if _wants_caption(part):
                    parts[place] = with_caption(part, next(written), self.captioner.name)
                    self._count(parts[place])
            filled.append(join_windows(parts))
        return filled

    def close(self) -> None:
        self.captioner.close()

    def _written(self, clips: list[np.ndarray]) -> list[Written]:
        """One result a clip; where a call breaks, each clip is tried alone."""
        try:
            return self.captioner.caption_all(clips) if clips else []
        except CaptionerUnavailable:
            raise
        except Exception as error:  # one clip must not take its neighbours with it
            log.warning("%s failed on %d clips", self.captioner.name, len(clips), exc_info=True)
            if len(clips) == 1:
                detail = f"{type(error).__name__}: {error}"
                return [Written.failed("internal_error", detail)]
            return [result for frames in clips for result in self._written([frames])]

    def _count(self, row: Row) -> None:
        error = row["caption_error"]
        self.failed_in_row = self.failed_in_row + 1 if error else 0
        if self.failed_in_row >= self.give_up_after:
            raise CaptionerUnavailable(
                f"{self.failed_in_row} captions in a row failed, the last with {error!r}; see to "
                f"the captioner ({self.captioner.name}) and run the same command again, or raise "
                "captioner.give_up_after"
            )


def _wants_caption(row: Row) -> bool:
    """Whether a row is undecided, no closing row and has no caption that stands."""
    return not row["status"] and row["number"] >= 0 and row["synthetic"] is None


def with_caption(row: Row, written: Written, captioner: str) -> Row:
    """The row with what a captioner made of it."""
    return {
        **row,
        "synthetic": written.text,
        "captioner": captioner,
        "caption_error": written.error or None,
    }


class EncodeStage:
    """Frames → posterior mean and log-variance, fp16, one clip at a time.

    One clip a batch and a fixed thread count: batching a clip with others would change a few bits.
    A row that has its latents, or whose shard needs no new ones (`encode` false), is kept as it is.
    """

    def __init__(
        self, config: PrepareConfig, codec: str, skip: frozenset[str], device: str = "cpu"
    ) -> None:
        import torch

        from flow.codec import VideoCodec

        torch.set_num_threads(config.encoder_threads)
        self.config = config
        self.skip = skip
        self.codec = VideoCodec.load(codec, device=device)

    def process(self, row: Row) -> Row:
        """Fills the moments and decides `kept`; moments outside fp16 fail the sample."""
        import torch

        if row["shard"] in self.skip or row["mean"] is not None:
            return decided({**row, "frames": None}, "kept", "", "")
        frames_BTHWC = torch.from_numpy(frames_of(row).copy())[None]
        mean_BTCHW, logvar_BTCHW = self.codec.encode(frames_BTHWC)
        mean = mean_BTCHW[0].cpu().numpy().astype("<f2")
        logvar = logvar_BTCHW[0].cpu().numpy().astype("<f2")
        if not (np.isfinite(mean).all() and np.isfinite(logvar).all()):
            return decided(row, "failed", "not_finite", "the codec's moments do not fit fp16")
        row = {
            **row,
            "frames": None,
            "mean": mean.tobytes(),
            "logvar": logvar.tobytes() if self.config.keep_logvar else None,
            "latent_shape": list(mean.shape),
            "codec": self.codec.digest,
            "look": perceptual_hash(frames_of(row)),
        }
        return decided(row, "kept", "", "")

    def close(self) -> None:
        """Holds nothing but memory."""


class SinkStage:
    """Stages finished rows and commits shards that are whole. One of them per run."""

    def __init__(self, config: PrepareConfig, out: Location, jobs: tuple[ShardJob, ...]) -> None:
        self.config = config
        self.ledger = Ledger(out)
        self._done: dict[str, bool] = {}
        self.jobs = {job.name: job for job in jobs}

    def accept(self, row: Row) -> bool:
        """Take one row; True where it completed its shard. Rows of finished shards are ignored."""
        job = self.jobs[row["shard"]]
        if self._is_done(job):
            return False
        if row["number"] < 0:
            self.ledger.close_reading(job, json.loads(row["closing"]))
        else:
            if not job.encode and not row["status"]:
                row = join_windows(
                    [p if p["status"] else decided(p, "kept", "", "") for p in split_windows(row)]
                )
            self.ledger.stage(job, self._staged(row))
        if job.encode:
            committed = self.ledger.commit_if_complete(job)
        else:
            committed = commit_captions_if_complete(self.ledger, job)
        self._done[job.name] = committed
        return committed

    def _is_done(self, job: ShardJob) -> bool:
        """Whether the job is committed; looked up once, as this is the run's only writer."""
        if job.name not in self._done:
            self._done[job.name] = self.ledger.is_done(job)
        return self._done[job.name]

    def _staged(self, row: Row) -> list[Row]:
        """The rows to keep of a sample: one per window that is kept, at least one."""
        names = ("key", "shard", "number", "status", "reason", "detail", "source_digest")
        head: Row = {name: row[name] for name in names}
        if row["status"] != "kept":
            return [head]
        staged = []
        for part in split_windows(row):
            if part["status"] != "kept":
                continue
            texts = ("window", "caption", "synthetic", "captioner", "caption_error")
            one = {**head, **{name: part[name] for name in texts}}
            if part["mean"] is not None:
                one |= {**self._record(part).row(), **head}
            staged.append(one)
        return staged

    def _record(self, row: Row) -> LatentRecord:
        frames, height, width = row["frames_shape"][:3]
        shape = row["latent_shape"]
        moments = {
            name: np.frombuffer(row[name], dtype="<f2").reshape(shape) if row[name] else None
            for name in ("mean", "logvar")
        }
        mean = moments["mean"]
        assert mean is not None
        assert math.prod(shape) == mean.size
        return LatentRecord(
            key=row["key"],
            window=row["window"],
            number=row["number"],
            bucket=Bucket(frames, height, width),
            fps=self.config.bucket.fps,
            pts_s=row["pts_s"],
            mean=mean,
            logvar=moments["logvar"],
            codec=row["codec"],
            look=row["look"],
            bars=tuple(row["bars"]),
            frames_digest=row["frames_digest"],
        )
