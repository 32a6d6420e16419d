"""The process that decodes video, so that it can be killed. Started by `media.read`.

Reads requests on stdin and writes replies on a private copy of stdout. A message is a 4-byte
length, a JSON head of that length, then `head["bytes"]` raw bytes.

    {"op": "load", "bytes": n} + data | {"op": "load", "path": p}   -> {"ok": true}
    {"op": "open", "max_pixels": n}                                 -> `Source.facts` + ticks int64
    {"op": "frames", "indices": [...]}                              -> one reply per frame
    any failure                                                     -> {"error": code, "message": m}

Knows nothing of deadlines, for the parent keeps the clock; nothing of `media.errors`, whose codes
it writes as text.
"""

from __future__ import annotations

import os
import sys
from typing import Any, BinaryIO

import av
import numpy as np

from media.framing import read_message, write_message
from media.sandbox import confine
from media.source import Refusal, Source, open_source


class Child:
    """Holds one loaded video and answers one request at a time."""

    def __init__(self, replies: BinaryIO) -> None:
        self.replies = replies
        self.data: bytes | str = b""
        self.source: Source | None = None
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
            self.source = open_source(self.data, self.max_pixels)
            write_message(self.replies, self.source.facts(), self.source.ticks.tobytes())
        elif head["op"] == "frames" and self.source is not None:
            for frame_HW3 in self.source.frames(head["indices"]):
                frame_HW3 = np.ascontiguousarray(frame_HW3)
                shape = {"shape": list(frame_HW3.shape)}
                write_message(self.replies, shape, frame_HW3.data.cast("B"))
        else:
            raise Refusal("unreadable_video", f"request {head} does not fit this state")


def main(memory_bytes: int) -> None:
    """Serve requests until stdin ends."""
    # Native libraries print to fd 1; replies go to a copy that they do not know.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    confine(memory_bytes)
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
        except av.FFmpegError as error:
            # Without the file's name: the same bytes fail with the same words wherever they lie.
            text = f"the decoder stopped: {error.strerror}"
            write_message(replies, {"error": "unreadable_video", "message": text})
        except (ValueError, OSError, RuntimeError, StopIteration) as error:
            text = f"{type(error).__name__}: {error}"[:300]
            write_message(replies, {"error": "unreadable_video", "message": text})
