"""The stages a sample passes: decode → filter → caption → encode, as plain classes.

    read_rows     rows of a shard that are not staged yet, and one closing row with their count
    DecodeStage   bytes → frames of one window, cut to the bucket (metadata is judged before)
    FilterStage   drops by what the decoder found
    CaptionStage  frames → synthetic caption
    EncodeStage   frames → posterior moments, fp16
    SinkStage     rows → staged samples → finished shards

A row is a dict of ROW_SCHEMA. `status` is empty while a sample goes on; a stage that decides sets
it with a reason and drops the payload, and later stages pass the row through: every sample ends in
exactly one status row, whatever is raised. Knows nothing of Ray.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data_prep.captions import CaptionerUnavailable, Written, build_captioner
from data_prep.clips import ClipTooShort, choose_window, fit_frame
from data_prep.config import PrepareConfig
from data_prep.duplicates import perceptual_hash
from data_prep.filters import judge_metadata, judge_source
from data_prep.latents import Bucket, LatentRecord
from data_prep.ledger import Ledger, ShardJob
from data_prep.recaption import commit_captions_if_complete
from data_prep.shards import ShardSummary, read_shard
from data_prep.storage import Location, StorageError
from media.errors import DecodeTimeout, ImageTooLarge, MediaError
from media.read import Clip, VideoInfo, VideoReader
from media.write import decode_image

log = logging.getLogger("flowreel.prepare")

Row = dict[str, Any]

ROW_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("number", pa.int32()),  # −1 in the closing row of a shard
        pa.field("key", pa.string()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("closing", pa.string()),  # ShardSummary as JSON, in the closing row
        pa.field("media", pa.large_binary()),
        pa.field("suffix", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("synthetic", pa.string()),
        pa.field("captioner", pa.string()),
        pa.field("caption_error", pa.string()),
        pa.field("frames", pa.large_binary()),
        pa.field("frames_shape", pa.list_(pa.int32())),
        pa.field("pts_s", pa.list_(pa.float64())),
        pa.field("source_height", pa.int32()),
        pa.field("source_width", pa.int32()),
        pa.field("duration_s", pa.float64()),
        pa.field("mean", pa.large_binary()),
        pa.field("logvar", pa.large_binary()),
        pa.field("latent_shape", pa.list_(pa.int32())),
        pa.field("codec", pa.string()),
        pa.field("look", pa.binary()),
    ]
)
PAYLOAD = ("media", "frames", "mean", "logvar")
"""Columns of ROW_SCHEMA that hold bytes by the megabyte; buffers of any kind in a row."""
_RETRY_DEADLINE = 3.0


class Stage(Protocol):
    """A step of the pipeline. `process` may raise: `run_stage` makes a status of it."""

    def process(self, row: Row) -> Row:
        """The row after this step."""
        ...

    def close(self) -> None:
        """Let go of what the stage holds."""
        ...


def decided(row: Row, status: str, reason: str, detail: str) -> Row:
    """The row at its end: `kept`, `dropped` or `failed`; only the first keeps its payload."""
    # Addresses differ between runs; status files must not.
    steady = re.sub(r" ?\b0x[0-9a-f]+", "", detail)[:300]
    row = {**row, "status": status, "reason": reason, "detail": steady}
    if status != "kept":
        row.update(dict.fromkeys(PAYLOAD))
    return row


def run_stage(stage: Stage, row: Row) -> Row:
    """One row through one stage; what it raises becomes the row's status."""
    if row["status"] or row["number"] < 0:
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
            "status": "",
            "reason": "",
            "detail": "",
            "media": sample.media,
            "suffix": sample.suffix,
            "metadata": json.dumps(sample.metadata, default=str),
            "caption": sample.caption,
        }
        if sample.problem:
            row = decided(row, "failed", sample.problem, sample.detail)
        elif sample.is_image and not config.images:
            row = decided(row, "dropped", "image", "this run takes no images")
        yield row
    closing = {"shard": job.name, "number": -1, "key": "", "status": ""}
    yield {**empty, **closing, "closing": json.dumps(asdict(summary))}


class DecodeStage:
    """Media bytes → uint8 frames [T, H, W, 3] of one window, in the bucket's size.

    Videos are decoded by `media.read` in a child process, decord first. A sample that its metadata
    drops is not decoded. A time-out is tried again with three times the deadline.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.reader = VideoReader(memory_bytes=config.caps.decoder_memory_bytes)

    def process(self, row: Row) -> Row:
        """Fills frames, their times and the source's size; raises MediaError or ClipTooShort."""
        drop = judge_metadata(json.loads(row["metadata"]), self.config.filters)
        if drop is not None:
            return decided(row, "dropped", drop.reason, drop.detail)
        if row["suffix"] in ("jpg", "jpeg", "png", "webp"):
            return self._image(row)
        try:
            clip, info = self._video(row, self.config.deadline_s)
        except DecodeTimeout:
            clip, info = self._video(row, self.config.deadline_s * _RETRY_DEADLINE)
        row = self._with_frames(row, clip.frames, list(clip.pts_s))
        row["source_height"], row["source_width"] = info.height, info.width
        row["duration_s"] = clip.duration_s
        return row

    def close(self) -> None:
        self.reader.close()

    def _video(self, row: Row, deadline_s: float) -> tuple[Clip, VideoInfo]:
        bucket, seen = self.config.bucket, []

        def choose(info: VideoInfo) -> list[int]:
            seen.append(info)
            return choose_window(
                info.pts_s, bucket.num_frames, bucket.fps, seed=self.config.seed, key=row["key"]
            )

        clip = self.reader.read(
            row["media"],
            choose=choose,
            transform=lambda frame_HW3: fit_frame(frame_HW3, bucket.height, bucket.width),
            deadline_s=deadline_s,
            max_frames=bucket.num_frames,
            max_pixels=self.config.caps.max_pixels,
            max_bytes=self.config.caps.max_media_bytes,
        )
        return clip, seen[-1]

    def _image(self, row: Row) -> Row:
        caps, bucket = self.config.caps, self.config.bucket
        try:
            frame_HW3 = decode_image(
                row["media"], max_bytes=caps.max_media_bytes, max_pixels=caps.max_pixels
            )
        except ImageTooLarge as error:
            return decided(row, "failed", error.reason, str(error))
        height, width = frame_HW3.shape[:2]
        fitted = fit_frame(frame_HW3, bucket.height, bucket.width)
        row = self._with_frames(row, fitted[None], [0.0])
        row["source_height"], row["source_width"] = height, width
        return row

    def _with_frames(self, row: Row, frames: np.ndarray, pts_s: list[float]) -> Row:
        return {
            **row,
            "media": None,
            "frames": frames.tobytes(),
            "frames_shape": list(frames.shape),
            "pts_s": pts_s,
        }


class FilterStage:
    """Drops by what only the decoder knew: area and length of the source."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config

    def process(self, row: Row) -> Row:
        """The row, dropped where a filter fails it."""
        drop = judge_source(
            row["source_height"], row["source_width"], row["duration_s"], self.config.filters
        )
        return decided(row, "dropped", drop.reason, drop.detail) if drop else row

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
        open_rows = [row for row in rows if not row["status"] and row["number"] >= 0]
        written = iter(self._written([frames_of(row) for row in open_rows]))
        filled = []
        for row in rows:
            if not row["status"] and row["number"] >= 0:
                row = with_caption(row, next(written), self.captioner.name)
                self._count(row)
            filled.append(row)
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
    A row whose shard needs no new latents (`encode` false) is kept as it is.
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

        if row["shard"] in self.skip:
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
                row = decided({**row, "frames": None}, "kept", "", "")
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

    def _staged(self, row: Row) -> Row:
        names = ("key", "shard", "number", "status", "reason", "detail")
        staged: Row = {name: row[name] for name in names}
        if row["status"] != "kept":
            return staged
        texts = ("caption", "synthetic", "captioner", "caption_error")
        staged |= {"window": 0, **{name: row[name] for name in texts}}
        if row["mean"] is not None:
            staged |= self._record(row).row()
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
            window=0,
            number=row["number"],
            bucket=Bucket(frames, height, width),
            fps=self.config.bucket.fps,
            pts_s=row["pts_s"],
            mean=mean,
            logvar=moments["logvar"],
            codec=row["codec"],
            look=row["look"],
        )


def frames_of(row: Row) -> np.ndarray:
    """The uint8 frames [T, H, W, 3] of a row."""
    return np.frombuffer(row["frames"], dtype=np.uint8).reshape(row["frames_shape"])
