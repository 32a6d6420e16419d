"""The run's history: one JSON line per step, consistent with the checkpoint a run goes on from.

Knows nothing of what is measured. Lines up to a checkpoint are on disk before the checkpoint is
marked complete; on resumption later lines are dropped, so that no step stands there twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from flowreel.files import write_whole

HISTORY_NAME = "history.jsonl"


def read_history(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a history file, in order; none where there is no file.

    A line that a crash cut is left out.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


class History:
    """Appends to a history file.

    Args:
        path: the file; made where there is none.
        start_step: first step to come; lines from it on are dropped.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / HISTORY_NAME
    >>> History(path, start_step=0).append([{"step": 0}, {"step": 1}])
    >>> History(path, start_step=1).append([{"step": 1, "again": True}])
    >>> read_history(path)
    [{'step': 0}, {'step': 1, 'again': True}]
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        before = [r for r in read_history(path) if int(r["step"]) < start_step]
        write_whole(path, "".join(json.dumps(r) + "\n" for r in before))
        self._size = path.stat().st_size
        self._unwritten = b""

    def append(self, records: Sequence[Mapping[str, Any]], *, durable: bool = False) -> None:
        """Add lines; `durable` waits until they would outlive a power cut.

        Lines that find no room are written by a later call.

        Raises:
            OSError: they, or lines before them, could not be written.
        """
        self._unwritten += "".join(json.dumps(r) + "\n" for r in records).encode()
        with self.path.open("r+b") as file:
            # Half a line that an earlier call left is written over.
            file.seek(self._size)
            file.write(self._unwritten)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        self._size += len(self._unwritten)
        self._unwritten = b""


@dataclass(frozen=True)
class HistoryPlace:
    """How far a history file was read: which file it was (its inode), and how many bytes."""

    file: int = 0
    size_bytes: int = 0


def records_after(
    path: Path, place: HistoryPlace, limit: int
) -> tuple[list[dict[str, Any]], HistoryPlace]:
    """Up to `limit` whole lines after a place, and the place behind them.

    Nothing is remembered, so that who reads moves on only when it has made use of the lines. A
    file that took the other's place is read from its beginning.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / HISTORY_NAME
    >>> History(path, start_step=0).append([{"step": 0}, {"step": 1}])
    >>> first, place = records_after(path, HistoryPlace(), limit=1)
    >>> first, records_after(path, place, limit=9)[0]
    ([{'step': 0}], [{'step': 1}])
    """
    if not path.is_file():
        return [], HistoryPlace()
    records: list[dict[str, Any]] = []
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        is_same = status.st_ino == place.file and status.st_size >= place.size_bytes
        size_bytes = place.size_bytes if is_same else 0
        file.seek(size_bytes)
        while len(records) < limit and (line := file.readline()).endswith(b"\n"):
            records.append(json.loads(line))
            size_bytes += len(line)
    return records, HistoryPlace(status.st_ino, size_bytes)


class HistoryTail:
    """Reads what was added to a history file since the last look, in any process.

    Args:
        path: the file; it may not be there yet.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / HISTORY_NAME
    >>> tail = HistoryTail(path)
    >>> History(path, start_step=0).append([{"step": 0}])
    >>> tail.new_records(), tail.new_records()
    ([{'step': 0}], [])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = 0
        self._offset = 0
        self._known: list[int] = []

    def new_records(self) -> list[dict[str, Any]]:
        """Whole lines added since the last call.

        When a resumed run has replaced the file, lines that it took over are known already and are
        not given again; lines of steps that it takes again are.
        """
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            # Another inode under the same name: the file was written anew, not appended to.
            replaced = os.fstat(file.fileno()).st_ino != self._file
            if replaced:
                self._file, self._offset = os.fstat(file.fileno()).st_ino, 0
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        hashes = [hash(line) for line in lines]
        known = 0
        if replaced:
            same = (a == b for a, b in zip(hashes, self._known, strict=False))
            known = sum(takewhile(bool, same))
            del self._known[known:]
        self._known += hashes[known:]
        return [json.loads(line) for line in lines[known:]]
