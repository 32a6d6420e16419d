"""The decoding stage: media bytes → frames of one window or several, each in one size or several.

Holds the order of things: judge the metadata, choose the length and the windows, measure bars, cut
to every resolution, and try a time-out again alone. How each is done is in
`data_prep.clips.windows`, `cut`, `filters` and in `media`. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.clips.buckets import Size
from data_prep.clips.cut import BarMeter, Bars, fit_frame, nearest_size
from data_prep.clips.filters import (
    Drop,
    judge_bars,
    judge_container,
    judge_enlargement,
    judge_metadata,
    judge_times,
)
from data_prep.clips.machine_lock import MachineLock
from data_prep.clips.windows import Timeline, choose_windows, longest_fit, without_gaps
from data_prep.config import PrepareConfig
from data_prep.ledger.reuse import Reuse
from data_prep.row import Row, decided, join_windows
from data_prep.sources.samples import IMAGE_SUFFIXES
from media.errors import DecodeTimeout
from media.frames import Frames
from media.read import Clip, VideoInfo, VideoReader
from media.write import decode_image

_RETRY_FACTOR = 3.0
"""A clip that ran out of time is tried again with so many times its deadline."""


class _Target(NamedTuple):
    """What becomes of a source in one resolution."""

    size: Size
    """Of the bucket of the nearest aspect."""
    drop: Drop | None
    """Why the source is not cut to it."""


@dataclass
class _Cut:
    """How a video is cut, as soon as its times and size are known."""

    info: VideoInfo
    windows: list[list[int]]
    """Frame indices of every window."""
    targets: list[_Target]
    """One for each resolution, in the order of the settings."""
    meter: BarMeter


class _Dropped(Exception):
    """A filter fails the source before one of its frames is decoded."""

    def __init__(self, drop: Drop) -> None:
        super().__init__(drop.detail)
        self.drop = drop


class DecodeStage:
    """Media bytes → uint8 frames [T, H, W, 3] of one window or several, in the nearest sizes.

    Every window is cut in each of the bucket's resolutions, all from one decoding; the row of a
    window carries its number as `BucketConfig` defines it.

    Videos are decoded by `media.read` in a child process. A sample that its metadata or container
    drops is not decoded, and neither is one whose outcome an earlier run has left. A time-out is
    tried again with three times the deadline, while nothing else is decoded on this machine: how
    busy a machine is must not decide what a sample becomes.

    >>> from data_prep.world.draw import random_scene

    >>> from data_prep.world.render import render_clip
    >>> from media.write import encode_mp4
    >>> video = encode_mp4(render_clip(random_scene(0), 40, 16.0), 16.0)
    >>> stage = DecodeStage(PrepareConfig(), sizes=[(64, 64), (48, 80)])
    >>> row = {"shard": "00000", "key": "a", "note": "", "metadata": "{}", "suffix": "mp4"}
    >>> stage.process({**row, "media": video})["frames_shape"]
    [17, 64, 64, 3]
    >>> stage.close()

    Args:
        config: the settings.
        sizes: (rows, columns) of the buckets, in pixels, as `BucketConfig.all_sizes` lists them:
            those of every resolution in turn, of each as many.
        lock: shared by all decoders of the machine.
        reuse: what earlier runs left of the samples.
    """

    def __init__(
        self,
        config: PrepareConfig,
        sizes: Sequence[Size],
        *,
        lock: MachineLock | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        self.config = config
        each = len(sizes) // max(1, len(config.bucket.resolutions))
        self.sizes = [sizes[first : first + each] for first in range(0, len(sizes), each)]
        self.reuse = reuse or Reuse()
        self.reader = VideoReader(memory_bytes=config.caps.decoder_memory_bytes)
        self.lock = lock or MachineLock()

    def process(self, row: Row) -> Row:
        """Fill in frames, their times and the source's size.

        Raises:
            MediaError: the media cannot be decoded.
            ClipTooShort: no window of frames fits into it.
        """
        drop = judge_metadata(json.loads(row["metadata"]), self.config.filters)
        if drop is not None:
            return decided(row, "dropped", drop.reason, drop.detail)
        if (outcome := self.reuse.outcome(row)) is not None:
            return outcome
        if row["suffix"] in IMAGE_SUFFIXES:
            return self._image(row)
        deadline_s = self.config.deadline_s
        # Others may try again too; whoever waits longer than that waits for a stopped process.
        patience_s = 4 * _RETRY_FACTOR * deadline_s
        try:
            with self.lock.shared(patience_s):
                return self._video(row, deadline_s)
        except DecodeTimeout:
            with self.lock.exclusive(patience_s):
                return self._video(row, deadline_s * _RETRY_FACTOR)
        except _Dropped as dropped:
            return decided(row, "dropped", dropped.drop.reason, dropped.drop.detail)

    def close(self) -> None:
        """End the decoding child."""
        self.reader.close()

    def _video(self, row: Row, deadline_s: float) -> Row:
        clip, cut = self._read(row, Bars(), deadline_s)
        bars = cut.meter.bars() if self.config.filters.crop_bars else Bars()
        height, width = cut.info.height, cut.info.width
        row = {**row, "source_height": height, "source_width": width, "duration_s": clip.duration_s}
        if note := _what_was_odd(cut.info):
            row["note"] = "; ".join(part for part in (row["note"], note) if part)
        if any(bars):
            if drop := judge_bars(bars, height, width, self.config.filters):
                return decided(row, "dropped", drop.reason, drop.detail)
            # Bars are known only after the last frame, and the whole frames could fill the memory:
            # so the video is decoded a second time.
            clip, cut = self._read(row, bars, deadline_s)
        return join_windows(list(_windows_of(row, clip, cut, bars)))

    def _targets(self, height: int, width: int) -> list[_Target]:
        """For each resolution the size nearest in aspect to a picture of this size."""
        sizes = [nearest_size(height, width, sizes) for sizes in self.sizes]
        bucket = self.config.bucket
        return [_Target(size, judge_enlargement(height, width, size, bucket)) for size in sizes]

    def _read(self, row: Row, bars: Bars, deadline_s: float) -> tuple[Clip, _Cut]:
        """All windows of a video, without the bars; the meter has seen every frame whole.

        The frames are flat: pixels of one resolution after the other (`_windows_of` parts them).
        """
        config, bucket = self.config, self.config.bucket
        cuts: list[_Cut] = []

        def choose(info: VideoInfo) -> list[int]:
            windows = self._windows(info, row["key"])
            targets = self._targets(*bars.size_inside(info.height, info.width))
            drops = [target.drop for target in targets if target.drop is not None]
            # Bars that are still to be measured may change the sizes, and so the verdicts.
            is_final = any(bars) or not config.filters.crop_bars
            if is_final and len(drops) == len(targets):
                raise _Dropped(drops[0])
            cuts.append(_Cut(info, windows, targets, BarMeter()))
            return [index for window in windows for index in window]

        def transform(frame_HW3: Frames) -> Frames:
            cut = cuts[-1]
            if config.filters.crop_bars:
                cut.meter.add(frame_HW3)
            picture_HW3 = bars.cut(frame_HW3)
            sizes = [target.size for target in cut.targets if target.drop is None]
            flat = [fit_frame(picture_HW3, *size).ravel() for size in sizes]
            return np.concatenate(flat) if flat else np.empty(0, dtype=np.uint8)

        clip = self.reader.read(
            row["media"],
            choose=choose,
            transform=transform,
            deadline_s=deadline_s,
            max_frames=bucket.lengths[0] * config.windows_per_clip,
            max_pixels=config.caps.max_pixels,
            max_bytes=config.caps.max_media_bytes,
        )
        return clip, cuts[-1]

    def _windows(self, info: VideoInfo, key: str) -> list[list[int]]:
        """The windows to cut from a video, without those that a gap in its times runs through."""
        config, bucket, filters = self.config, self.config.bucket, self.config.filters
        timeline = Timeline(info.ticks, info.time_base)
        drop = judge_container(info.facts, filters) or judge_times(timeline, filters)
        if drop is not None:
            raise _Dropped(drop)
        chosen = choose_windows(
            timeline,
            longest_fit(timeline, bucket.lengths, bucket.fps),
            bucket.fps,
            seed=config.seed,
            key=key,
            at_most=config.windows_per_clip,
        )
        if filters.max_gap_s is None:
            return chosen
        windows = without_gaps(timeline, chosen, bucket.fps, filters.max_gap_s)
        if not windows:
            gap_s = max(timeline.largest_gap_s(window, bucket.fps) for window in chosen)
            detail = f"{float(gap_s):.3f} s without a frame, over {filters.max_gap_s:g} s"
            raise _Dropped(Drop("gap", detail))
        return windows

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
        parts = []
        for number, target in enumerate(self._targets(*bars.size_inside(height, width))):
            part = {**row, "window": number}
            if target.drop is not None:
                parts.append(decided(part, "dropped", target.drop.reason, target.drop.detail))
                continue
            frames_THW3 = fit_frame(picture_HW3, *target.size)[None]
            parts.append(_with_frames(part, frames_THW3, [0.0], bars))
        return join_windows(parts)


def _windows_of(row: Row, clip: Clip, cut: _Cut, bars: Bars) -> Iterator[Row]:
    """A row for each window in each resolution, in the order of their numbers."""
    for place, window in enumerate(cut.windows):
        inside = slice(place * len(window), (place + 1) * len(window))
        first = 0
        for resolution, (size, drop) in enumerate(cut.targets):
            part = {**row, "window": place * len(cut.targets) + resolution}
            if drop is not None:
                yield decided(part, "dropped", drop.reason, drop.detail)
                continue
            end = first + 3 * math.prod(size)
            frames_THW3 = clip.frames[inside, first:end].reshape(len(window), *size, 3)
            first = end
            yield _with_frames(part, frames_THW3, list(clip.pts_s[inside]), bars)


def _what_was_odd(info: VideoInfo) -> str:
    """What of the container was put right, for the status of a sample that is kept."""
    facts = info.facts
    notes = []
    if facts["transfer"] != "sdr":
        notes.append(f"hdr: {facts['transfer']}, tone-mapped")
    if facts["hidden_packets"]:
        notes.append(f"edit list: {facts['hidden_packets']} frames hidden")
    if facts["packets_before_keyframe"]:
        notes.append(
            f"keyframe: {facts['packets_before_keyframe']} frames before the first left out"
        )
    return "; ".join(notes)


def _with_frames(row: Row, frames_THW3: Frames, pts_s: list[float], bars: Bars) -> Row:
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
