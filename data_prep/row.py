"""The row that passes through the stages: one per sample, which may hold several windows.

`status` is empty while a sample goes on. A video cut into one window of frames has its payload in
the row's own columns. A video cut into several has a carrier row: its column `windows` holds a
whole row for each, packed, so that a sample is never spread over blocks. `split_windows` and
`join_windows` go there and back. A stage sees single windows only. Knows nothing of Ray.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from media.frames import Frames

Row = dict[str, Any]
"""A row of ROW_SCHEMA, by the names of its columns."""

ROW_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("number", pa.int32()),  # place in the shard; −1 in the shard's closing row
        pa.field("key", pa.string()),
        pa.field("window", pa.int32()),  # number of the window among those cut from the video
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
        pa.field("reused", pa.bool_()),  # latents or verdict are those of an earlier run
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
"""Columns that hold bytes by the megabyte; in a row they may be buffers of any kind."""
_LARGE = (*PAYLOAD, "windows")
FINAL_CAPTION_CODES = ("no_captioner", "not_moving_shapes")
"""Codes of `caption_error` of clips that are without a synthetic caption on purpose."""


def is_closing(row: Row) -> bool:
    """Whether a row ends its shard, rather than being a sample of it."""
    return bool(row["number"] < 0)


def wants_caption(row: Row) -> bool:
    """Whether a row is an undecided sample without a synthetic caption."""
    return not row["status"] and not is_closing(row) and row["synthetic"] is None


def is_final(caption_error: str | None) -> bool:
    """Whether the same captioner would refuse the clip again: then it is not asked again.

    >>> is_final("not_moving_shapes: other video"), is_final("timeout: 60 s"), is_final(None)
    (True, False, False)
    """
    return (caption_error or "").partition(":")[0] in FINAL_CAPTION_CODES


def decided(row: Row, status: str, reason: str, detail: str) -> Row:
    """The row at its end: `kept`, `dropped` or `failed`; only the first keeps its payload.

    A kept row without a detail takes its note for one.

    >>> row = decided({"note": "", "media": b"..."}, "failed", "empty_video", "it has 0 bytes")
    >>> row["status"], row["reason"], row["media"]
    ('failed', 'empty_video', None)
    """
    if status == "kept":
        return {
            **row,
            "status": status,
            "reason": reason,
            "detail": detail or row.get("note") or "",
        }
    # Addresses differ between runs, and status files must not.
    steady = re.sub(r" ?\b0x[0-9a-f]+", "", detail)[:300]
    row = {**row, "status": status, "reason": reason, "detail": steady}
    return {**row, **dict.fromkeys(_LARGE)}


def split_windows(row: Row) -> list[Row]:
    """One row per window of a carrier; any other row by itself."""
    if not row.get("windows"):
        return [row]
    parts: list[Row] = []
    for data in row["windows"]:
        with pa.ipc.open_stream(data) as stream:
            parts += stream.read_all().to_pylist()
    return parts


def join_windows(parts: Sequence[Row]) -> Row:
    """The row of a sample from the rows of its windows.

    The sample goes on while one window does. It is kept where one window is; its detail then says
    which windows are not. Where none is kept, the end of the first window is the sample's.

    >>> empty = dict.fromkeys(ROW_SCHEMA.names)
    >>> first = {**empty, "window": 0, "status": "", "note": ""}
    >>> second = {**empty, "window": 1, "status": "dropped", "reason": "black_frames"}
    >>> row = join_windows([first, second])
    >>> row["status"], row["detail"], len(split_windows(row))
    ('', 'windows: not 1 black_frames', 2)
    """
    if len(parts) == 1:
        return parts[0]
    first = {**parts[0], **dict.fromkeys(_LARGE)}
    statuses = [part["status"] for part in parts]
    if "" in statuses or "kept" in statuses:
        ends = [f"{p['window']} {p['reason']}" for p in parts if p["status"] not in ("", "kept")]
        details = [f"windows: not {', '.join(ends)}"] if ends else []
        details += [first["note"]] if first["note"] else []
        status = "" if "" in statuses else "kept"
        first |= {"status": status, "reason": "", "detail": "; ".join(details)}
        first["windows"] = [_packed(part) for part in parts]
    return first


def _packed(row: Row) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ROW_SCHEMA) as writer:
        writer.write_table(table_of([row]))
    return bytes(sink.getvalue())


def frames_of(row: Row) -> Frames:
    """The uint8 frames [T, H, W, 3] of a row.

    >>> frames_of({"frames": bytes(2 * 4 * 4 * 3), "frames_shape": [2, 4, 4, 3]}).shape
    (2, 4, 4, 3)
    """
    return np.frombuffer(row["frames"], dtype=np.uint8).reshape(row["frames_shape"])


def table_of(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table of ROW_SCHEMA."""
    return pa.Table.from_pylist(list(rows), schema=ROW_SCHEMA)


def rows_of(table: pa.Table) -> list[Row]:
    """The rows of a table; frames and moments are views of the table's own memory, not copies."""
    views = [name for name in PAYLOAD if name != "media"]
    rows: list[Row] = table.drop_columns(views).to_pylist()
    for name in views:
        for row, buffer in zip(rows, buffers_of(table[name]), strict=True):
            row[name] = memoryview(buffer) if buffer is not None else None
    return rows


def window_tables(table: pa.Table, at: int) -> list[pa.Table]:
    """The windows of a carrier as tables of ROW_SCHEMA, views of its memory; none of other rows."""
    packed = table["windows"][at]
    if not packed.is_valid:
        return []
    tables = []
    for buffer in buffers_of(pa.chunked_array([packed.values])):
        with pa.ipc.open_stream(buffer) as stream:
            tables.append(stream.read_all())
    return tables


def buffers_of(column: pa.ChunkedArray) -> list[pa.Buffer | None]:
    """The values of a column of large binaries as views of its memory; None for a null.

    Arrow's own scalars are copies.

    >>> column = pa.chunked_array([[b"ab", None], [b"c"]], pa.large_binary())
    >>> [buffer and buffer.to_pybytes() for buffer in buffers_of(column)]
    [b'ab', None, b'c']
    """
    views: list[pa.Buffer | None] = []
    for chunk in column.chunks:
        if not len(chunk):
            continue
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, "<i8")[chunk.offset :][: len(chunk) + 1].tolist()
        for begin, end, value in zip(ends, ends[1:], chunk.is_valid(), strict=False):
            is_there = value.as_py()
            views.append(data.slice(begin, end - begin) if is_there else None)
    return views
