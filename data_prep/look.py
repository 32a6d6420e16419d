"""What preparation makes of one input, and why: the stages of a run, carried out on one sample.

The sample is read, decoded and filtered by the very stages of `prepare` (`data_prep.stages`), so
that the outcome is that of a run with the same settings. Caption and codec are left out: they drop
no sample. Knows nothing of Ray, torch or the command line.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from data_prep.clips.decode import DecodeStage
from data_prep.clips.windows import Timeline, exact_rate
from data_prep.config import PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.look_record import Look, WindowLook
from data_prep.reasons import remedy_of, setting_value
from data_prep.row import Row, decided, frames_of, join_windows, split_windows
from data_prep.sources.config import SourceConfig
from data_prep.sources.find import name_shards
from data_prep.sources.listing import ShardError
from data_prep.sources.one_sample import LooseFile, OneSample, groups_in, open_any
from data_prep.sources.samples import IMAGE_SUFFIXES, Group
from data_prep.stages import FilterStage, read_rows, run_stage
from flow.codec_factors import CodecFactors
from media.errors import MediaError
from media.formats import HEAD_BYTES, Refused, recognise
from media.frames import Frames
from media.read import Choose, VideoInfo
from media.write import image_facts

_OVERVIEW_FRAMES = 9


def look_at(source: str, key: str | None, config: PrepareConfig, factors: CodecFactors) -> Look:
    """What a run with these settings makes of one sample.

    Of several samples with one key it is the first, as in a run.

    Args:
        source: a shard (tar, folder, URI), or a video or image by itself.
        key: the sample's key in the shard; None for a file by itself.
        config: the settings.
        factors: the codec's, from which the sizes of buckets follow.

    Raises:
        ShardError: there is no such shard, file or key.
        SizeError: the codec does not take clips of the bucket's size or length.
        StorageError: the disk or store fails.
    """
    config.bucket.check(factors)
    archive, listing = open_any(source, config.source)
    groups = groups_in(listing, config.source)
    if isinstance(archive, LooseFile):
        number = _number_of_file(groups, archive.path.name)
    else:
        number = _number_of_key(groups, key or "", source)
    (name,) = name_shards([source])
    job = ShardJob(name, source, fingerprint="", latent_digest="", caption_digest="")
    others = set(range(len(groups))) - {number}
    one = OneSample(archive, listing, groups[number])
    with contextlib.closing(read_rows(job, config, skip=others, archive=one)) as rows:
        row = next(rows)
    same_key = sum(group.key == groups[number].key for group in groups) - 1
    look = _through_stages(source, row, config, factors)
    return replace(look, same_key=same_key)


def keys_in(source: str, config: SourceConfig) -> list[tuple[str, list[str], int]]:
    """(key, suffixes, bytes) of every sample of a shard, in order; no file is read.

    Raises:
        ShardError: there is no such shard, or nothing in it can be read.
    """
    archive, listing = open_any(source, config)
    archive.close()
    return [
        (group.key, list(group.members), sum(m.size_bytes for m in group.members.values()))
        for group in groups_in(listing, config)
    ]


def _number_of_file(groups: Sequence[Group], name: str) -> int:
    return next(
        number
        for number, group in enumerate(groups)
        if any(member.name == name for member in group.members.values())
    )


def _number_of_key(groups: Sequence[Group], key: str, source: str) -> int:
    keys = [group.key for group in groups]
    if key in keys:
        return keys.index(key)
    near = difflib.get_close_matches(key, keys, n=1)
    meant = f"did you mean {near[0]!r}?" if near else f"the first is {keys[0]!r}"
    raise ShardError(f"{source}: no sample {key!r} among its {len(keys)}; {meant}")


def _through_stages(source: str, row: Row, config: PrepareConfig, factors: CodecFactors) -> Look:
    """A sample as it was read, through the stages, with all that was found on the way."""
    media, is_image = row["media"] or b"", row["suffix"] in IMAGE_SUFFIXES
    decoder = DecodeStage(config, config.bucket.all_sizes(factors.space))
    with contextlib.closing(decoder):
        end = run_stage(decoder, row)
        cut = [] if end["status"] else split_windows(end)
        parts = [_at_end(run_stage(FilterStage(config), part)) for part in cut]
        end = join_windows(parts) if parts else end
        info = None if is_image or not media else _probe(decoder, media)
        shown = _overview(decoder, media, info) if info is not None and not cut else []
    reader, why = _reader_of(row, info)
    return Look(
        source=source,
        shard=row["shard"],
        key=row["key"],
        number=row["number"],
        **{name: end[name] for name in ("status", "reason", "detail")},
        remedy=_remedy(end, config, factors, info),
        caption=row["caption"],
        metadata=json.loads(row["metadata"]),
        reader=reader,
        reader_why=why,
        facts=_facts(media, info) if reader else {},
        # A size that a window would be enlarged too much for has no frames.
        windows=tuple(
            _window(*pair, info) for pair in zip(cut, parts, strict=True) if pair[0]["frames"]
        ),
        overview=tuple(frame for _, frame in shown),
        overview_s=tuple(time_s for time_s, _ in shown),
    )


def _at_end(row: Row) -> Row:
    """A window that came through; a run's encoder would decide it so."""
    return row if row["status"] else decided(row, "kept", "", "")


def _window(cut: Row, end: Row, info: VideoInfo | None) -> WindowLook:
    times = np.zeros(1) if info is None else info.pts_s
    places = np.searchsorted(times, np.array(cut["pts_s"]))
    return WindowLook(
        number=cut["window"],
        window=[int(place) for place in places],
        pts_s=[float(time) for time in cut["pts_s"]],
        **{name: end[name] for name in ("status", "reason", "detail")},
        frames_digest=cut["frames_digest"],
        frames=frames_of(cut),
    )


def _limits(decoder: DecodeStage) -> dict[str, Any]:
    caps = decoder.config.caps
    return {
        "deadline_s": decoder.config.deadline_s,
        "max_pixels": caps.max_pixels,
        "max_bytes": caps.max_media_bytes,
    }


def _probe(decoder: DecodeStage, media: bytes) -> VideoInfo | None:
    """What the container says; None where it cannot be opened, as the outcome says too."""
    try:
        return decoder.reader.probe(media, **_limits(decoder))
    except MediaError:
        return None


def _overview(decoder: DecodeStage, media: bytes, info: VideoInfo) -> list[tuple[float, Frames]]:
    """(seconds, frame) of a few frames of the whole source, or of its first where they fail."""
    last = info.num_frames - 1
    spread = sorted({last * n // (_OVERVIEW_FRAMES - 1) for n in range(_OVERVIEW_FRAMES)})
    choices: list[Choose] = [lambda _: spread, lambda _: [0]]
    for choose in choices:
        try:
            clip = decoder.reader.read(media, choose=choose, **_limits(decoder))
        except MediaError:
            continue  # a damaged stream: the outcome says so, and the picture shows what there is
        return list(zip((float(time) for time in clip.pts_s), clip.frames, strict=True))
    return []


def _reader_of(row: Row, info: VideoInfo | None) -> tuple[str, str]:
    """The reader of a sample, and why it is that; none where the media are not opened at all."""
    media = row["media"]
    if not media:
        return "", "there is nothing to decode"
    if row["suffix"] in IMAGE_SUFFIXES:
        return "pillow", f"the suffix .{row['suffix']} is that of an image"
    container = recognise(media[:HEAD_BYTES])
    if isinstance(container, Refused):
        return "", container.message
    why = f"its first bytes are those of {container.name}, and it is opened as nothing else"
    if info is None:
        return "pyav", why
    timed = "times are those of its packets"
    counted = "its packets carry no usable times, so frames are counted at its rate"
    return "pyav", f"{why}; {timed if info.facts['timed'] else counted}"


def _facts(media: bytes, info: VideoInfo | None) -> dict[str, Any]:
    if info is not None:
        counted = {"frames": info.num_frames, "duration_s": info.duration_s}
        return {**info.facts, **counted}
    try:
        return image_facts(media)
    except MediaError:
        return {}


def _remedy(row: Row, config: PrepareConfig, factors: CodecFactors, info: VideoInfo | None) -> str:
    """What would keep a sample, with the present values of the settings that decide."""
    if row["status"] == "kept":
        return ""
    remedy = remedy_of(row["reason"])
    now = {name: json.dumps(setting_value(config, name)) for name in remedy.settings}
    if remedy.off:
        (setting,) = remedy.settings
        return f"--set prepare.{setting}={remedy.off} (now {now[setting]}): {remedy.advice}"
    if row["reason"] == "too_short" and info is not None:
        fit = str(_frames_that_fit(config, factors, info))
        setting = "bucket.num_frames"
        if config.bucket.frame_counts:
            setting, fit = "bucket.frame_counts", f"[{fit}]"
        return f"--set prepare.{setting}={fit} (now {now[setting]}): {remedy.advice}"
    present = ", ".join(f"prepare.{name} is {value}" for name, value in now.items())
    return remedy.advice + (f": {present}" if present else "")


def _frames_that_fit(config: PrepareConfig, factors: CodecFactors, info: VideoInfo) -> int:
    """The longest window, as the codec takes it, that fits into a source."""
    timeline = Timeline(info.ticks, info.time_base)
    # The last target time may lie half a step past the last frame.
    steps = math.floor(timeline.last_s * exact_rate(config.bucket.fps) + Fraction(1, 2))
    return factors.near_frames(steps + 1)[0]
