"""Videos as crawls bring them, made so that what was read can be told from the picture.

Every frame shows four fields of known colours and, in its top eighth, its own number in eight bits,
least significant left, white is 1.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from media.frames import Frames
from media.pixels import HLG, PQ, WHITE_NITS

COLOURS = ((200, 30, 30), (30, 180, 60), (40, 60, 200), (128, 128, 128))
"""Top left, top right, bottom left, bottom right."""
SIDE = 128
RATE = 25
COUNT = 100


def picture(number: int, height: int = SIDE, width: int = SIDE) -> Frames:
    """A numbered picture, uint8 [H, W, 3]."""
    frame = np.empty((height, width, 3), dtype=np.uint8)
    rows, columns = height // 2, width // 2
    frame[:rows, :columns], frame[:rows, columns:] = COLOURS[0], COLOURS[1]
    frame[rows:, :columns], frame[rows:, columns:] = COLOURS[2], COLOURS[3]
    for bit in range(8):
        cell = slice(bit * width // 8, (bit + 1) * width // 8)
        frame[: height // 8, cell] = 255 if number >> bit & 1 else 0
    return frame


def number_in(frame: Frames) -> int:
    """The number that a picture shows."""
    height, width = frame.shape[:2]
    row = frame[height // 16]
    return sum((row[int((bit + 0.5) * width / 8)].mean() > 128) << bit for bit in range(8))


def colours_in(frame: Frames) -> np.ndarray:
    """The colours of the four fields, int [4, 3]."""
    height, width = frame.shape[:2]
    places = [(3 / 8, 1 / 4), (3 / 8, 3 / 4), (3 / 4, 1 / 4), (3 / 4, 3 / 4)]
    return np.array([frame[int(y * height), int(x * width)] for y, x in places]).astype(int)


def video(
    *,
    suffix: str = "mp4",
    codec: str = "libx264",
    count: int = COUNT,
    size: tuple[int, int] = (SIDE, SIDE),
    times: Callable[[int], int] | None = None,
    time_base: Fraction = Fraction(1, RATE),
    rate: int = RATE,
    options: dict[str, str] | None = None,
    set_up: Callable[[Any], None] | None = None,
    frame_of: Callable[[int], av.VideoFrame] | None = None,
) -> bytes:
    """`count` numbered frames of `size` (rows, columns) in a container."""
    out = io.BytesIO()
    with av.open(out, "w", format=_FORMATS.get(suffix, suffix)) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.time_base = time_base
        stream.codec_context.time_base = time_base
        x264 = {"preset": "veryfast", "crf": "10", "x264-params": "keyint=50:min-keyint=50"}
        stream.options = {**(x264 if codec == "libx264" else {}), **(options or {})}
        if set_up is not None:
            set_up(stream)
        for number in range(count):
            if frame_of is None:
                frame = av.VideoFrame.from_ndarray(picture(number % 256, *size), format="rgb24")
            else:
                frame = frame_of(number)
            frame.pts = number if times is None else times(number)
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


_FORMATS = {"mkv": "matroska", "ts": "mpegts"}


def remuxed(
    data: bytes, *, keep: Callable[[int, Any], bool], shift: int = 0, suffix: str = "mp4"
) -> bytes:
    """The packets that `keep(number, packet)` names, their times shifted by so many ticks."""
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(out, "w", format=suffix) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            if keep(number, packet):
                packet.pts += shift
                packet.dts += shift
                packet.stream = copy
                container.mux(packet)
    return out.getvalue()


def cut_with_edit_list() -> bytes:
    """What `ffmpeg -ss 1.0 -c copy` makes: 25 of 100 frames hidden by an edit list."""
    whole = video()
    with av.open(io.BytesIO(whole)) as container:
        one_second = round(1 / container.streams.video[0].time_base)
    return remuxed(whole, keep=lambda number, packet: True, shift=-one_second)


def without_first_keyframe() -> bytes:
    """Cut in the middle of a group of pictures: 17 packets before the first keyframe."""
    return remuxed(video(), keep=lambda number, packet: number >= 33)


def size_changes(first: int = 50) -> bytes:
    """Frames of 128×128, then 50 of 144×256, one transport stream after the other."""
    return video(suffix="ts", count=first) + video(suffix="ts", count=50, size=(144, 256))


def with_matrix(a: int, b: int, c: int, d: int, count: int = 20) -> bytes:
    """A video whose track header holds a display matrix of these whole numbers."""
    data = bytearray(video(count=count))
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(unit, data.index(b"tkhd"))
    entries = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *entries)
    return bytes(data)


def tall_pixels(count: int = 20) -> bytes:
    """256 rows and 128 columns of pixels twice as wide as high: shown as a square."""

    def wide(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    return video(count=count, size=(256, 128), set_up=wide)


def interlaced() -> bytes:
    """25 frames of two fields each."""
    return video(count=25, options={"x264-params": "tff=1:interlaced=1"})


def hdr(transfer: int, count: int = 20) -> bytes:
    """The same picture as HDR: PQ or HLG, BT.2020, ten bits."""

    def tags(stream: Any) -> None:
        stream.pix_fmt = "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = 9, transfer, 9
        context.color_range = 1

    def frame_of(number: int) -> av.VideoFrame:
        signal = _hdr_signal(picture(number), transfer)
        rgb = av.VideoFrame.from_ndarray(signal, format="rgb48le")
        frame = rgb.reformat(format="yuv420p10le", dst_colorspace=9)
        frame.color_primaries, frame.color_trc, frame.colorspace = 9, transfer, 9
        return frame

    # 10-bit H.264 holds HDR as well as H.265 does.
    return video(count=count, set_up=tags, frame_of=frame_of)


def _hdr_signal(rgb_HW3: Frames, transfer: int) -> np.ndarray:
    """sRGB to an HDR signal, uint16 of full scale, by the standards' own equations."""
    value = rgb_HW3 / 255
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_2020 = np.array(
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    nits = light @ to_2020.T * WHITE_NITS
    if transfer == PQ:
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        power = (nits / 10000) ** m1
        signal = ((c1 + c2 * power) / (1 + c3 * power)) ** m2
    else:
        assert transfer == HLG
        luma = (nits / 1000) @ np.array([0.2627, 0.6780, 0.0593])
        scene = nits / 1000 * np.maximum(luma, 1e-6)[..., None] ** (1 / 1.2 - 1)
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        bright = a * np.log(np.maximum(12 * scene - b, 1e-6)) + c
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)
    return np.rint(np.clip(signal, 0, 1) * 65535).astype(np.uint16)


def several_streams() -> bytes:
    """A small picture beside the film: the main stream is the larger one."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        streams = []
        for size in ((32, 32), (SIDE, SIDE)):
            stream = container.add_stream("libx264", rate=RATE)
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            streams.append((stream, size))
        for number in range(20):
            for stream, size in streams:
                frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream, _ in streams:
            container.mux(stream.encode(None))
    return out.getvalue()


def with_gap(half: int = 50) -> bytes:
    """50 frames, 30 s of nothing, 50 frames."""
    late = 30 * RATE
    return video(count=2 * half, times=lambda number: number + (late if number >= half else 0))


def damaged(seed: int = 0) -> bytes:
    """A video with some bytes of its pictures changed."""
    data = bytearray(video())
    begin = data.index(b"mdat") + 2000
    rng = np.random.default_rng(seed)
    for at in rng.integers(begin, len(data) - 100, 40):
        data[at] ^= 0x5A
    return bytes(data)


def playlists(folder: Path, url: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of files that are no video and name other files or a host."""
    secret = (folder / "secret.mp4").resolve()
    yield "hls", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/a.ts\n".encode()
    yield "hls of a local file", f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n".encode()
    yield "hls after a mark", b"\xef\xbb\xbf#EXTM3U\n" + f"{url}/a.ts\n".encode()
    yield "concat", f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    yield "concat of a host", f"ffconcat version 1.0\nfile {url}/a.mp4\n".encode()
    yield (
        "dash",
        (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period>'
            f"<AdaptationSet><Representation><BaseURL>{url}/a.mp4</BaseURL></Representation>"
            "</AdaptationSet></Period></MPD>"
        ).encode(),
    )
    yield "dash without a declaration", f"<MPD><BaseURL>{url}/</BaseURL></MPD>".encode()
    yield "sdp", b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n"
    yield "pls", f"[playlist]\nFile1={url}/a.mp4\n".encode()
    yield "asx", f'<asx version="3.0"><entry><ref href="{url}/a.wmv"/></entry></asx>'.encode()
    yield "address", f"{url}/a.mp4\n".encode()
    yield "rtsp reference", b"RTSPtext rtsp://127.0.0.1/a\n"
