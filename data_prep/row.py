"""The row that passes through the stages: one per sample, which may hold several windows.

`status` is empty while a sample goes on. A video cut into one window has its payload in the row's own
columns. One cut into several is a carrier: `windows` holds a whole row for each, packed, so that a
sample is never spread over blocks, and `split_windows` and `join_windows` go there and back. A stage
sees single windows only. Knows nothing of Ray.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]

ROW_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("number", pa.int32()),  # −1 in the closing row of a shard
        pa.field("key", pa.string()),
        pa.field("window", pa.int32()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("note", pa.string()),  # becomes the detail of a sample that is kept
        pa.field("closing", pa.string()),  # ShardSummary as JSON, in the closing row
        pa.field("media", pa.large_binary()),
        pa.field("suffix", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("synthetic", pa.string()),
        pa.field("captioner", pa.string()),
        pa.field("caption_error", pa.string()),
        pa.field("source_digest", pa.string()),  # of the sample as it was read
        pa.field("frames_digest", pa.string()),  # of what the latents and the caption are made of
        pa.field("reused", pa.bool_()),  # latents or verdict stood already
        pa.field("frames", pa.large_binary()),
        pa.field("frames_shape", pa.list_(pa.int32())),
        pa.field("pts_s", pa.list_(pa.float64())),
        pa.field("source_height", pa.int32()),
        pa.field("source_width", pa.int32()),
        pa.field("bars", pa.list_(pa.int32())),  # cut off: top, bottom, left, right
        pa.field("duration_s", pa.float64()),
        pa.field("mean", pa.large_binary()),
        pa.field("logvar", pa.large_binary()),
        pa.field("latent_shape", pa.list_(pa.int32())),
        pa.field("codec", pa.string()),
        pa.field("look", pa.binary()),
        pa.field("windows", pa.list_(pa.large_binary())),
    ]
)
PAYLOAD = ("media", "frames", "mean", "logvar")
"""Columns that hold bytes by the megabyte; buffers of any kind in a row."""
_LARGE = (*PAYLOAD, "windows")


def decided(row: Row, status: str, reason: str, detail: str) -> Row:
    """The row at its end: `kept`, `dropped` or `failed`; only the first keeps its payload.

    A kept row without a detail takes its note for one.
    """
    if status == "kept":
        return {
            **row,
            "status": status,
            "reason": reason,
            "detail": detail or row.get("note") or "",
        }
    # Addresses differ between runs; status files must not.
    steady = re.sub(r" ?\b0x[0-9a-f]+", "", detail)[:300]
    row = {**row, "status": status, "reason": reason, "detail": steady}
    return {**row, **dict.fromkeys(_LARGE)}


def split_windows(row: Row) -> list[Row]:
    """One row per window; the row itself where it is no carrier."""
    if not row.get("windows"):
        return [row]
    parts: list[Row] = []
    for packed in row["windows"]:
        with pa.ipc.open_stream(packed) as stream:
            parts += stream.read_all().to_pylist()
    return parts


def join_windows(parts: Sequence[Row]) -> Row:
    """The row of a sample from those of its windows.

    It goes on while one of them does. It is kept where one is, its detail then says which windows are
    not; where none is, the first one's end is the sample's.
    """
    if len(parts) == 1:
        return parts[0]
    first = {**parts[0], **dict.fromkeys(_LARGE)}
    statuses = [part["status"] for part in parts]
    if "" in statuses or "kept" in statuses:
        ends = [f"{p['window']} {p['reason']}" for p in parts if p["status"] not in ("", "kept")]
        said = [f"windows: not {', '.join(ends)}"] if ends else []
        detail = "; ".join([*said, *([first["note"]] if first["note"] else [])])
        first |= {"status": "" if "" in statuses else "kept", "reason": "", "detail": detail}
        first["windows"] = [_packed(part) for part in parts]
    return first


def _packed(row: Row) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ROW_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist([row], schema=ROW_SCHEMA))
    return bytes(sink.getvalue())


def frames_of(row: Row) -> np.ndarray:
    """The uint8 frames [T, H, W, 3] of a row."""
    return np.frombuffer(row["frames"], dtype=np.uint8).reshape(row["frames_shape"])
