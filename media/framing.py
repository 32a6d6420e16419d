"""Messages between a reader and its decoding process: length, JSON head, raw bytes.

Standard library only, as both ends import it.
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

HEAD = struct.Struct("<I")
"""Length of the JSON head that follows, whose `bytes` says how much comes after it."""


def packed(head: dict[str, Any], num_bytes: int) -> bytes:
    """Length and head of a message with a payload of so many bytes."""
    encoded = json.dumps({**head, "bytes": num_bytes}).encode()
    return HEAD.pack(len(encoded)) + encoded


def write_message(pipe: BinaryIO, head: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message and flush."""
    pipe.write(packed(head, len(payload)))
    pipe.write(payload)
    pipe.flush()


def read_message(pipe: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message, or None at the end of the pipe."""
    prefix = pipe.read(HEAD.size)
    if len(prefix) < HEAD.size:
        return None
    head = json.loads(pipe.read(HEAD.unpack(prefix)[0]))
    return head, pipe.read(head["bytes"])
