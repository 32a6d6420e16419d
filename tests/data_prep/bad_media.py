"""Files of every kind that a crawl brings, made by PyAV and Pillow, as small as they can be."""

from __future__ import annotations

import io
import os
import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

SIZE = (48, 64)
"""Rows and columns: a width that both readers take."""


def moving(count: int, height: int = SIZE[0], width: int = SIZE[1]) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] of a bright square that wanders over a textured ground."""
    ground = np.random.default_rng(0).integers(60, 120, (height, width, 3), dtype=np.uint8)
    frames = []
    for number in range(count):
        frame = ground.copy()
        left = number * 2 % (width - 8)
        frame[height // 4 : height // 2, left : left + 8] = (230, 60, 40)
        frames.append(frame)
    return frames


def video(
    frames: list[np.ndarray],
    *,
    codec: str = "libx264",
    container: str = "mp4",
    fps: int = 16,
    pix_fmt: str = "yuv420p",
    ticks: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Encode frames; `ticks` are times in milliseconds for a rate that varies."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if ticks:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame_HW3 in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")
            picture.pts = ticks[number] if ticks else number
            picture.time_base = Fraction(1, 1000) if ticks else Fraction(1, fps)
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
    return out.getvalue()


def av1() -> bytes:
    """AV1. Its encoder gives whoever runs it as root real-time priority, which is given back here.

    Kept, the tests after it and all that they start would let nothing else run.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        return video(moving(20, 64, 64), codec="libsvtav1")
    finally:
        os.sched_setscheduler(0, policy, parameters)


def audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        tone = np.sin(np.arange(44100, dtype=np.float32) / 20)[None] * 0.3
        sound = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        sound.sample_rate = 44100
        for packet in [*stream.encode(sound), *stream.encode(None)]:
            file.mux(packet)
    return out.getvalue()


def gif() -> bytes:
    out = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in moving(20)]
    first.save(out, "GIF", save_all=True, append_images=rest, duration=60)
    return out.getvalue()


def box(data: bytes, *path: str) -> int:
    """Where the body of an mp4 box begins."""
    begin, end = 0, len(data)
    for name in path:
        place = begin
        while place < end:
            size, kind = struct.unpack_from(">I4s", data, place)
            if kind == name.encode():
                begin, end = place + 8, place + size
                break
            place += size
        else:
            raise KeyError(name)
    return begin


_TABLE = ("moov", "trak", "mdia", "minf", "stbl")


def claiming_frames(count: int) -> bytes:
    """An mp4 whose sample tables promise `count` frames where there are twenty."""
    data = bytearray(video(moving(20)))
    struct.pack_into(">I", data, box(data, *_TABLE, "stsz") + 8, count)
    struct.pack_into(">I", data, box(data, *_TABLE, "stts") + 8, count)
    return bytes(data)


def without_duration() -> bytes:
    """An mp4 in whose headers every length is zero."""
    data = bytearray(video(moving(20)))
    for path, offset in ((("moov", "mvhd"), 16), (("moov", "trak", "tkhd"), 20)):
        struct.pack_into(">I", data, box(data, *path) + offset, 0)
    struct.pack_into(">I", data, box(data, "moov", "trak", "mdia", "mdhd") + 16, 0)
    struct.pack_into(">I", data, box(data, *_TABLE, "stts") + 12, 0)
    return bytes(data)


def rotated() -> bytes:
    """A quarter turn in the header's matrix, as phones write it."""
    data = bytearray(video(moving(20)))
    turn = (0, 1 << 16, 0, (1 << 32) - (1 << 16), 0, 0, 0, 0, 1 << 30)
    struct.pack_into(">9I", data, box(data, "moov", "trak", "tkhd") + 40, *turn)
    return bytes(data)


def png_bomb(side: int = 20_000) -> bytes:
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG", optimize=False)
    return out.getvalue()


def flat(height: int, width: int, count: int) -> bytes:
    """Black frames of any size: a file of a few kB."""
    black = [np.zeros((height, width, 3), dtype=np.uint8)] * count
    return video(black, fps=8, options={"preset": "ultrafast"})


def with_bars(frames: list[np.ndarray], rows: int, columns: int = 0) -> list[np.ndarray]:
    return [np.pad(frame, ((rows, rows), (columns, columns), (0, 0))) for frame in frames]


def sample(key: str, **members: Any) -> dict[str, Any]:
    """A sample for `write_shard`, with its key for a caption unless there is another."""
    return {"__key__": key, "txt": key, **members}
