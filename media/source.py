"""One opened video: what its container says, and its frames. Runs in the decoding process.

PyAV alone reads, one thread, from memory or an open file, as the one container that the first bytes
show. Nothing here tries a second way after a failure: what comes out depends on the bytes alone.
Knows nothing of pipes, deadlines or who asked.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData

from media.formats import HEAD_BYTES, Container, Refused, recognise
from media.pixels import HLG, PQ, Orientation, orientation_of, tone_mapped

_RAW_RATE = Fraction(25)
"""Frames per second of a stream that says none and carries no times."""
_TRANSFERS = {PQ: "pq", HLG: "hlg"}


class Refusal(Exception):
    """A failure that has a reason code of its own in `media.errors`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse frames over the cap."""
    if width * height > max_pixels:
        raise Refusal(
            "video_too_large", f"frames are {width}×{height}; the cap is {max_pixels} pixels"
        )


class Source:
    """A video whose packets have been listed and whose first frame has been decoded.

    `ticks` int64 [N] are the times of the frames that are shown, rising, in units of `time_base`;
    where a container's packets carry no sound times they are counted, one rate step apart.
    """

    def __init__(self, file: BinaryIO, max_pixels: int) -> None:
        self._file = file
        self._max_pixels = max_pixels
        head = file.read(HEAD_BYTES)
        container = recognise(head)
        if isinstance(container, Refused):
            raise Refusal(container.reason, container.message)
        self.container: Container = container
        self.orientation = Orientation()
        self._list_packets()
        first = next(self._decoded(0))
        self.orientation = orientation_of(_matrix_of(first))
        self.interlaced = bool(first.interlaced_frame)
        transfer = int(first.color_trc or 0)
        self._transfer = transfer if transfer in _TRANSFERS else 0
        self.coded = (first.width, first.height)
        wide = round(first.width * self._pixel_aspect) if self._pixel_aspect else first.width
        self._square = (max(1, wide), first.height)
        shown = self._square[::-1] if self.orientation.transpose else self._square
        self.width, self.height = shown
        check_size(self.width, self.height, max_pixels)

    def facts(self) -> dict[str, Any]:
        """What is known before a frame is chosen, as plain values."""
        return {
            "container": self.container.name,
            "codec": self._codec,
            "width": self.width,
            "height": self.height,
            "coded_width": self.coded[0],
            "coded_height": self.coded[1],
            "orientation": str(self.orientation),
            "pixel_aspect": _pair(self._pixel_aspect),
            "transfer": _TRANSFERS.get(self._transfer, "sdr"),
            "interlaced": self.interlaced,
            "time_base": _pair(self.time_base),
            "rate": _pair(self.rate),
            "timed": self.timed,
            "video_streams": self._video_streams,
            "hidden_packets": self._hidden,
            "packets_before_keyframe": self._before_keyframe,
        }

    def _open(self) -> tuple[Any, Any]:
        """The container, opened as what it is, and its main video stream."""
        self._file.seek(0)
        # No protocol at all: the demuxer may read this file and open nothing beside it.
        options = {"protocol_whitelist": "none"}
        container = av.open(self._file, format=self.container.demuxer, options=options)
        pictures = av.stream.Disposition.attached_pic
        videos = [s for s in container.streams.video if not s.disposition & pictures]
        if not videos:
            container.close()
            raise Refusal("empty_video", "there is no video stream in the file")
        # The film is the largest picture; of equals the first.
        stream = max(videos, key=lambda s: s.codec_context.width * s.codec_context.height)
        self._video_streams = len(videos)
        # The size in the header is held against the cap before a frame is decoded.
        check_size(stream.codec_context.width, stream.codec_context.height, self._max_pixels)
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        return container, stream

    def _list_packets(self) -> None:
        """Times of the frames that will be shown, without decoding one."""
        container, stream = self._open()
        with container:
            self._codec = stream.codec_context.codec.canonical_name
            aspect = stream.sample_aspect_ratio
            self._pixel_aspect = Fraction(aspect) if aspect and aspect != 1 else None
            rate = stream.average_rate or stream.guessed_rate
            self.rate = Fraction(rate) if rate else None
            packets = [
                (packet.pts, packet.is_keyframe, packet.is_discard)
                for packet in container.demux(stream)
                if packet.size
            ]
            base = stream.time_base
        keyed = next((n for n, (_, key, _) in enumerate(packets) if key), 0)
        self._before_keyframe = keyed
        whole = packets[keyed:]
        shown = [pts for pts, _, hidden in whole if not hidden]
        self._hidden = len(whole) - len(shown)
        if not shown:
            raise Refusal("empty_video", "there is no frame in the video stream")
        sound = self.container.indexed or self.container.demuxer in ("mpegts", "flv", "asf")
        known = [pts for pts in shown if pts is not None]
        complete = len(known) == len(shown)
        # Streams put one after the other begin their times anew; an index does not.
        once = self.container.indexed or len(set(known)) == len(known)
        self.timed = bool(sound and base and complete and once)
        if self.timed:
            first_key = packets[keyed][0]
            # Pictures shown before the first keyframe refer to what is not there.
            floor = first_key if keyed and first_key is not None else min(known)
            self.ticks = np.array(sorted({pts for pts in known if pts >= floor}), dtype=np.int64)
            self.time_base = Fraction(base)
        else:
            self.ticks = np.arange(len(shown), dtype=np.int64)
            self.time_base = 1 / (self.rate or _RAW_RATE)

    def _decoded(self, tick: int, *, seek: bool = False) -> Iterator[Any]:
        container, stream = self._open()
        with container:
            if seek:
                container.seek(tick, stream=stream, backward=True)
            yield from container.decode(stream)

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames at rising (or repeated) places, uint8 [H, W, 3], as they are meant to be seen.

        Raises Refusal where one of them is damaged, missing, or of another size than the first.
        """
        pictures = self._from(indices[0])
        place, frame = next(pictures, (-1, None))
        shown: np.ndarray | None = None
        for turn, index in enumerate(indices):
            if turn and index == indices[turn - 1] and shown is not None:
                yield shown
                continue
            while frame is not None and place < index:
                place, frame = next(pictures, (-1, None))
            if frame is None or place != index:
                raise Refusal("unreadable_video", f"frame {index} could not be decoded")
            shown = self._as_shown(frame, index)
            yield shown

    def _from(self, index: int) -> Iterator[tuple[int, Any]]:
        """(place, frame) from a place at or before `index` on."""
        if not self.timed:
            yield from enumerate(self._decoded(0))
            return
        ticks = {int(tick): place for place, tick in enumerate(self.ticks)}
        seek = index > 0 and self.container.indexed
        started = False
        for frame in self._decoded(int(self.ticks[index]), seek=seek):
            place = ticks.get(frame.pts, -1)
            if place < 0:
                continue
            if seek and not started and place > index:
                # Some keyframes need what is before them: then all is decoded from the beginning.
                yield from self._from(0)
                return
            started = True
            yield place, frame

    def _as_shown(self, frame: Any, index: int) -> np.ndarray:
        if frame.is_corrupt:
            raise Refusal("unreadable_video", f"frame {index} is marked corrupt")
        if (frame.width, frame.height) != self.coded:
            raise Refusal(
                "size_changes",
                f"frame {index} is {frame.width}×{frame.height}, the first {self.coded[0]}×"
                f"{self.coded[1]}; cut the video where its size changes",
            )
        width, height = self._square
        square = {"width": width, "height": height, "interpolation": "BICUBIC"}
        size = square if self._pixel_aspect else {}
        if self._transfer:
            wide = frame.to_ndarray(format="rgb48le", **size)
            picture = tone_mapped(wide, self._transfer)
        else:
            picture = frame.to_ndarray(format="rgb24", **size)
        return self.orientation.apply(picture)


def _matrix_of(frame: Any) -> bytes | None:
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    return None if data is None else bytes(data)


def _pair(value: Fraction | None) -> list[int] | None:
    return None if value is None else [value.numerator, value.denominator]


def open_source(data: bytes | str, max_pixels: int) -> Source:
    """The video in these bytes or at this path. The file is opened here, never by a library."""
    file: BinaryIO = io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb")  # noqa: SIM115
    return Source(file, max_pixels)
