"""Which container a file is, by its first bytes, before any library opens it.

A library that guesses may take a file for a playlist and fetch what it names. So a file is opened
only as a container on this list, and a file that names other files or hosts is refused by name.
Standard library only. Knows nothing of decoding.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD_BYTES = 4096
"""How much of a file is looked at."""


class Container(NamedTuple):
    """A container that may be opened."""

    name: str
    """What people call it."""
    demuxer: str
    """The one demuxer that FFmpeg may open it with."""
    indexed: bool
    """Whether its packets carry times to be trusted and an index to seek by."""


class Refused(NamedTuple):
    """Why a file is not opened: a reason code of `media.errors` and the words for it."""

    reason: str
    message: str


MP4 = Container("mp4", "mov", indexed=True)
MATROSKA = Container("matroska", "matroska", indexed=True)
AVI = Container("avi", "avi", indexed=False)
MPEG_TS = Container("mpeg-ts", "mpegts", indexed=False)

_BMFF_BOXES = frozenset(
    (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx")
)
_SIGNATURES: tuple[tuple[bytes, Container], ...] = (
    (b"\x1aE\xdf\xa3", MATROSKA),
    (b"FLV\x01", Container("flv", "flv", indexed=False)),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Container("asf", "asf", indexed=False)),
    (b"OggS", Container("ogg", "ogg", indexed=False)),
    (b"GIF87a", Container("gif", "gif", indexed=False)),
    (b"GIF89a", Container("gif", "gif", indexed=False)),
    (b"DKIF", Container("ivf", "ivf", indexed=False)),
    (b"YUV4MPEG2 ", Container("y4m", "yuv4mpegpipe", indexed=False)),
    (b"\x00\x00\x01\xba", Container("mpeg-ps", "mpeg", indexed=False)),
    (b"\x00\x00\x01\xb3", Container("mpeg-es", "mpegvideo", indexed=False)),
)
_TEXTS: tuple[tuple[str, str], ...] = (
    (r"#EXTM3U|#EXTINF", "an HLS playlist"),
    (r"ffconcat version", "a concat script"),
    (r"v=0\s+o=", "an SDP session"),
    (r"\[playlist\]", "a PLS playlist"),
    (r"\[Reference\]", "a reference file"),
    (r"<(\?xml|MPD|smil|asx|playlist|SmoothStreamingMedia|rss)\b", "an XML manifest"),
    (r"(file|https?|rtsp|rtmp|rtp|udp|tcp|ftp|concat|subfile|data|pipe|crypto):", "an address"),
    (r"RTSPtext", "an RTSP reference"),
)
_H264_STARTS, _HEVC_STARTS = (7, 9), (32, 33, 35)
"""Types of the unit that a raw stream begins with: parameter sets or a delimiter."""


def recognise(head: bytes) -> Container | Refused:
    """The container that a file's first `HEAD_BYTES` show, or why it is not opened.

    >>> recognise(b"\\x00\\x00\\x00\\x20ftypisom").name
    'mp4'
    >>> recognise(b"#EXTM3U\\nhttp://host/a.ts").reason
    'names_other_files'
    """
    if head[4:8] in _BMFF_BOXES:
        return MP4
    for signature, container in _SIGNATURES:
        if head.startswith(signature):
            return container
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"AVIX"):
        return AVI
    if _is_transport_stream(head):
        return MPEG_TS
    raw = _raw_stream(head)
    if raw is not None:
        return raw
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return Refused("empty_video", "a sound file (WAVE): there is no video stream in it")
    return _not_video(head)


def _is_transport_stream(head: bytes) -> bool:
    """Sync bytes at every packet of 188 bytes, or of 192 (with a time stamp before each)."""
    for first, step in ((0, 188), (4, 192)):
        marks = head[first::step][:8]
        if len(marks) >= 3 and set(marks) == {0x47}:
            return True
    return False


def _raw_stream(head: bytes) -> Container | None:
    """A raw H.264 or H.265 stream: a start code, then a parameter set or a delimiter."""
    start = next((n for n in (4, 3) if head[:n] == b"\x00" * (n - 1) + b"\x01"), 0)
    if not start or len(head) < start + 2:
        return None
    unit = head[start]
    if unit & 0x1F in _H264_STARTS and not unit & 0x80:
        return Container("h264", "h264", indexed=False)
    if (unit >> 1) & 0x3F in _HEVC_STARTS and head[start + 1] & 0x07:
        return Container("hevc", "hevc", indexed=False)
    return None


def _not_video(head: bytes) -> Refused:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().decode("latin-1")
    for pattern, name in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE):
            return Refused(
                "names_other_files",
                f"it is {name}, which names other files or hosts; give the video itself",
            )
    shown = head[:16].hex(" ")
    return Refused("unreadable_video", f"no video container that is read here begins with {shown}")
