"""The decoding stage: media bytes → frames of one window or several, in the nearest bucket's size.

Holds the order of things (judge the metadata, choose windows, measure bars, cut, time-outs again and
alone); how each is done is in `data_prep.clips.cut`, `data_prep.clips.filters` and `media`. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from data_prep.clips.cut import (
    BarMeter,
    Bars,
    choose_windows,
    fit_frame,
    nearest_size,
)
from data_prep.clips.filters import judge_bars, judge_metadata
from data_prep.clips.machine_lock import Alone
from data_prep.config import PrepareConfig
from data_prep.ledger.reuse import Reuse
from data_prep.row import (
    Row,
    decided,
    join_windows,
)
from data_prep.sources.samples import IMAGE_SUFFIXES
from media.errors import DecodeTimeout
from media.read import Clip, VideoInfo, VideoReader
from media.write import decode_image

_RETRY_DEADLINE = 3.0


@dataclass
class _Cut:
    """How a video is cut, as soon as its times and size are known."""

    info: VideoInfo
    windows: list[list[int]]
    size: tuple[int, int]
    meter: BarMeter


class DecodeStage:
    """Media bytes → uint8 frames [T, H, W, 3] of one window or several, in the nearest bucket's size.

    Videos are decoded by `media.read` in a child process, decord first. A sample that its metadata
    drops is not decoded. A time-out is tried again with three times the deadline, while nothing else
    is decoded on this machine: a busy machine must not decide what a sample becomes. Nor is one whose outcome stands.
    """

    def __init__(
        self, config: PrepareConfig, alone: Alone | None = None, reuse: Reuse | None = None
    ) -> None:
        self.config = config
        self.reuse = reuse or Reuse()
        self.reader = VideoReader(memory_bytes=config.caps.decoder_memory_bytes)
        self.alone = alone or Alone()

    def process(self, row: Row) -> Row:
        """Fills frames, their times and the source's size; raises MediaError or ClipTooShort."""
        drop = judge_metadata(json.loads(row["metadata"]), self.config.filters)
        if drop is not None:
            return decided(row, "dropped", drop.reason, drop.detail)
        if (standing := self.reuse.outcome(row)) is not None:
            return standing
        if row["suffix"] in IMAGE_SUFFIXES:
            return self._image(row)
        deadline_s = self.config.deadline_s
        patience_s = 4 * _RETRY_DEADLINE * deadline_s
        try:
            with self.alone.beside_others(patience_s):
                return self._video(row, deadline_s)
        except DecodeTimeout:
            with self.alone.by_itself(patience_s):
                return self._video(row, deadline_s * _RETRY_DEADLINE)

    def close(self) -> None:
        self.reader.close()

    def _video(self, row: Row, deadline_s: float) -> Row:
        clip, cut = self._read(row, Bars(), deadline_s)
        bars = cut.meter.bars() if self.config.filters.crop_bars else Bars()
        height, width = cut.info.height, cut.info.width
        row = {**row, "source_height": height, "source_width": width, "duration_s": clip.duration_s}
        if any(bars):
            if drop := judge_bars(bars, height, width, self.config.filters):
                return decided(row, "dropped", drop.reason, drop.detail)
            # Bars are known once all frames are seen; holding those whole could fill the memory.
            clip, cut = self._read(row, bars, deadline_s)
        num_frames = self.config.bucket.num_frames
        parts = []
        for window in range(len(cut.windows)):
            inside = slice(window * num_frames, (window + 1) * num_frames)
            part = _with_frames(row, clip.frames[inside], list(clip.pts_s[inside]), bars)
            parts.append({**part, "window": window})
        return join_windows(parts)

    def _read(self, row: Row, bars: Bars, deadline_s: float) -> tuple[Clip, _Cut]:
        """All windows of a video, without the bars; the meter has seen every frame whole."""
        config, bucket = self.config, self.config.bucket
        cuts: list[_Cut] = []

        def choose(info: VideoInfo) -> list[int]:
            windows = choose_windows(
                info.pts_s,
                bucket.num_frames,
                bucket.fps,
                seed=config.seed,
                key=row["key"],
                at_most=config.windows_per_clip,
            )
            size = nearest_size(*bars.size_inside(info.height, info.width), bucket.all_sizes())
            cuts.append(_Cut(info, windows, size, BarMeter()))
            return [index for window in windows for index in window]

        def transform(frame_HW3: np.ndarray) -> np.ndarray:
            if config.filters.crop_bars:
                cuts[-1].meter.add(frame_HW3)
            return fit_frame(bars.cut(frame_HW3), *cuts[-1].size)

        clip = self.reader.read(
            row["media"],
            choose=choose,
            transform=transform,
            deadline_s=deadline_s,
            max_frames=bucket.num_frames * config.windows_per_clip,
            max_pixels=config.caps.max_pixels,
            max_bytes=config.caps.max_media_bytes,
        )
        return clip, cuts[-1]

    def _image(self, row: Row) -> Row:
        caps, filters = self.config.caps, self.config.filters
        frame_HW3 = decode_image(
            row["media"], max_bytes=caps.max_media_bytes, max_pixels=caps.max_pixels
        )
        height, width = frame_HW3.shape[:2]
        row = {**row, "source_height": height, "source_width": width}
        meter = BarMeter()
        if filters.crop_bars:
            meter.add(frame_HW3)
        bars = meter.bars()
        if drop := judge_bars(bars, height, width, filters):
            return decided(row, "dropped", drop.reason, drop.detail)
        picture_HW3 = bars.cut(frame_HW3)
        size = nearest_size(*bars.size_inside(height, width), self.config.bucket.all_sizes())
        return _with_frames(row, fit_frame(picture_HW3, *size)[None], [0.0], bars)


def _with_frames(row: Row, frames_THW3: np.ndarray, pts_s: list[float], bars: Bars) -> Row:
    """The row with the frames of one window in the place of its media."""
    frames = frames_THW3.tobytes()
    digest = hashlib.sha256(str(frames_THW3.shape).encode())
    digest.update(frames)
    notes = [row["note"]] if row["note"] else []
    if any(bars):
        sides = zip(("top", "bottom", "left", "right"), bars, strict=True)
        notes.append("bars: " + ", ".join(f"{side} {pixels}" for side, pixels in sides))
    return {
        **row,
        "media": None,
        "frames": frames,
        "frames_shape": list(frames_THW3.shape),
        "frames_digest": digest.hexdigest(),
        "pts_s": pts_s,
        "bars": list(bars),
        "note": "; ".join(notes),
    }
