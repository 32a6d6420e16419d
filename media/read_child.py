"""The process that decodes video, so that it can be killed. Run by path from `media.read`.

Reads requests on stdin and writes replies on a private copy of stdout. A message is a 4-byte
length, a JSON head of that length, then `head["bytes"]` raw bytes.

    {"op": "load", "bytes": n} + data | {"op": "load", "path": p}      -> {"ok": true}
    {"op": "open", "reader": "decord" | "pyav", "max_pixels": n}         -> VideoInfo + pts float64
    {"op": "frames", "indices": [...]}                                   -> one reply per frame
    any failure                                                          -> {"error": code, ...}

Knows nothing of deadlines, for the parent keeps the clock; nothing of `media.errors`, whose codes
it writes as text.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

# Only numpy at the start, and none of our own packages: every kill costs a start, which a program
# that decodes thousands of bad videos pays each time. The process runs by path without its folder
# on the path (`-P`), so that no file beside it can take the place of a library's module. decord
# and PyAV are imported where first needed, for decord is not built for every machine.
import numpy as np

HEAD = struct.Struct("<I")
_AHEAD_BYTES = 2**30
"""decord decodes on while its frames are taken, up to the whole video, which must fit this."""
# Native messages carry the time of day and source lines; the same file must fail the same way.
_NOISE = re.compile(r"\[\d\d:\d\d:\d\d\] |\S+\.cc:\d+: | ?\b0x[0-9a-f]+")


def write_message(pipe: BinaryIO, head: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """One message: length, JSON head (given its `bytes`), payload."""
    encoded = json.dumps({**head, "bytes": len(payload)}).encode()
    pipe.write(HEAD.pack(len(encoded)) + encoded)
    pipe.write(payload)
    pipe.flush()


def read_message(pipe: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message, or None at the end of the pipe."""
    prefix = pipe.read(HEAD.size)
    if len(prefix) < HEAD.size:
        return None
    head = json.loads(pipe.read(HEAD.unpack(prefix)[0]))
    return head, pipe.read(head["bytes"])


class Refusal(Exception):
    """A failure that has a code of its own in `media.errors`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse frames over the cap."""
    if width * height > max_pixels:
        raise Refusal(
            "video_too_large", f"frames are {width}×{height}; the cap is {max_pixels} pixels"
        )


def check_header(source: bytes | str, max_pixels: int) -> None:
    """Refuse by what the file says of itself, before a frame is decoded: no video, too large.

    What cannot be opened is left to the readers, which say why.
    """
    import av

    try:
        container = av.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (OSError, ValueError):
        return
    with container:
        if not container.streams:
            return
        if not container.streams.video:
            raise Refusal("empty_video", "there is no video stream in the file")
        context = container.streams.video[0].codec_context
        check_size(context.width, context.height, max_pixels)


class DecordSource:
    """decord: fast and exact in seeking; applies rotation itself."""

    def __init__(self, source: bytes | str) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        self.reader = decord.VideoReader(opened, num_threads=1)
        count = len(self.reader)
        if not count:
            raise Refusal("empty_video", "decord found no frame")
        self.pts_s = np.asarray(
            self.reader.get_frame_timestamp(np.arange(count))[:, 0], dtype=np.float64
        )
        self.fps = float(self.reader.get_avg_fps())
        first = self.reader[0]
        if first.shape[2] != 3:
            # decord takes the channels from the padded row length: 4 or 6 at widths 16, 24, 48, 72.
            raise Refusal("unreadable_video", f"decord reads width {first.shape[1]} wrongly")
        self.height, self.width = (int(n) for n in first.shape[:2])
        if count * self.height * self.width * 3 > _AHEAD_BYTES:
            raise Refusal(
                "unreadable_video",
                f"decord could hold {count} frames of {self.width}×{self.height}",
            )

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """RGB frames uint8 [H, W, 3] of these indices, in their order."""
        for index in indices:
            yield self.reader[index].asnumpy()


class PyAVSource:
    """PyAV: opens what decord cannot (AV1 in Matroska); rotation applied here."""

    def __init__(self, source: bytes | str) -> None:
        import av

        self.av = av
        self.source = source
        with self._open() as container:
            stream = container.streams.video[0]
            # Packets, not frames: times are read without decoding anything.
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            tick_s = float(stream.time_base or 0)
            self.fps = float(stream.average_rate or stream.guessed_rate or 0)
            has_times = all(p.pts is not None for p in packets) and tick_s > 0
            # A raw stream carries no times: frames are then counted instead.
            ticks = (
                sorted({int(p.pts) for p in packets}) if has_times else list(range(len(packets)))
            )
            self.index_of_tick = {tick: n for n, tick in enumerate(ticks)} if has_times else None
            self.ticks = ticks
        if not ticks:
            raise Refusal("empty_video", "PyAV found no frame")
        step_s = tick_s if has_times else 1.0 / (self.fps or 25.0)
        self.pts_s = np.asarray(ticks, dtype=np.float64) * step_s
        first = next(self.frames([0]))
        self.height, self.width = (int(n) for n in first.shape[:2])

    def _open(self) -> Any:
        opened = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        container = self.av.open(opened)
        if not container.streams.video:
            container.close()
            raise Refusal("empty_video", "PyAV found no video stream")
        # One thread: many decoders share the machine, and frames must not depend on its cores.
        container.streams.video[0].thread_type = "NONE"
        container.streams.video[0].thread_count = 1
        return container

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """RGB frames uint8 [H, W, 3] of these indices, which do not fall, in their order."""
        index_set = set(indices)
        ready: dict[int, np.ndarray] = {}
        turn = 0
        with self._open() as container:
            stream = container.streams.video[0]
            if self.index_of_tick is not None and indices[0] > 0:
                # To the key frame before the first of them.
                container.seek(self.ticks[indices[0]], stream=stream, backward=True)
            for count, frame in enumerate(container.decode(stream)):
                index = count if self.index_of_tick is None else self.index_of_tick.get(frame.pts)
                if index in index_set:
                    if frame.is_corrupt:
                        raise Refusal("unreadable_video", f"frame {index} is marked corrupt")
                    quarter_turns = round(frame.rotation / 90) % 4
                    ready[index] = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)
                # An index may be repeated: its frame is let go after its last turn.
                while turn < len(indices) and indices[turn] in ready:
                    yield ready[indices[turn]]
                    turn += 1
                    if turn == len(indices) or indices[turn] != indices[turn - 1]:
                        ready.pop(indices[turn - 1], None)
                if turn == len(indices):
                    return
        raise Refusal("unreadable_video", f"frame {indices[turn]} could not be decoded")


SOURCES: dict[str, type[DecordSource] | type[PyAVSource]] = {
    "decord": DecordSource,
    "pyav": PyAVSource,
}


class Child:
    """Holds one loaded video and answers one request at a time."""

    def __init__(self, replies: BinaryIO) -> None:
        self.replies = replies
        self.data: bytes | str = b""
        self.source: DecordSource | PyAVSource | None = None
        self.max_pixels = 0

    def answer(self, head: dict[str, Any], payload: bytes) -> None:
        """Write the replies to one request, or raise what is wrong with it or with the video."""
        if head["op"] == "load":
            self.source = None
            self.data = head.get("path") or payload
            write_message(self.replies, {"ok": True})
        elif head["op"] == "open":
            self.source = None
            self.max_pixels = head["max_pixels"]
            check_header(self.data, self.max_pixels)
            self.source = source = SOURCES[head["reader"]](self.data)
            check_size(source.width, source.height, self.max_pixels)
            info = {"width": source.width, "height": source.height, "fps": source.fps}
            write_message(self.replies, info, source.pts_s.tobytes())
        elif head["op"] == "frames" and self.source is not None:
            for frame_HW3 in self.source.frames(head["indices"]):
                # Frames may grow in the middle of a stream.
                check_size(frame_HW3.shape[1], frame_HW3.shape[0], self.max_pixels)
                frame_HW3 = np.ascontiguousarray(frame_HW3)
                shape = {"shape": list(frame_HW3.shape)}
                write_message(self.replies, shape, frame_HW3.data.cast("B"))
        else:
            raise Refusal("unreadable_video", f"request {head} does not fit this state")


def _leave_with_parent(parent: int) -> None:
    """A killed parent must not leave a decoder that loops forever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def main(memory_bytes: int) -> None:
    """Serve requests until stdin ends."""
    # Native libraries print to fd 1; replies go to a copy that they do not know.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit_memory(memory_bytes)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    child = Child(replies)
    requests = sys.stdin.buffer
    while (message := read_message(requests)) is not None:
        try:
            child.answer(*message)
        except Refusal as refusal:
            write_message(replies, {"error": refusal.code, "message": str(refusal)})
        except MemoryError:
            text = f"decoding needs more than {memory_bytes} bytes of memory"
            write_message(replies, {"error": "video_too_large", "message": text})
        except Exception as error:  # native readers raise types of their own, bare Exception too
            lines = str(error).strip().splitlines() or [type(error).__name__]
            text = _NOISE.sub("", lines[-1])[-300:]
            write_message(replies, {"error": "unreadable_video", "message": text})


if __name__ == "__main__":
    main(int(sys.argv[1]))
