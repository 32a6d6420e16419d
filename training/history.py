"""The run's history: one JSON line per step, consistent with the checkpoint a run goes on from.

Knows nothing of what is measured. Lines up to a checkpoint are on disk before the checkpoint is
marked complete; on resumption later lines are dropped, so that no step stands there twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

HISTORY_NAME = "history.jsonl"


def read_history(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a history file, in order; [] where there is none. A line cut by a crash
    is left out.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


class History:
    """Appends to a history file."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        kept = [r for r in read_history(path) if int(r["step"]) < start_step]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept))
        part.replace(path)

    def append(self, records: Sequence[Mapping[str, Any]], *, durable: bool = False) -> None:
        """Add lines; `durable` waits until they would outlive a power cut."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))
            file.flush()
            if durable:
                os.fsync(file.fileno())


class HistoryTail:
    """Reads what was added to a history file since the last look, in another process than the
    writer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = 0
        self._offset = 0
        self._seen: list[int] = []

    def new_records(self) -> list[dict[str, Any]]:
        """Whole lines added since the last call.

        When a resumed run has replaced the file, the lines it kept are known already and are not
        given again; the lines it does again are.
        """
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            replaced = os.fstat(file.fileno()).st_ino != self._file
            if replaced:
                self._file, self._offset = os.fstat(file.fileno()).st_ino, 0
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        hashes = [hash(line) for line in lines]
        kept = 0
        if replaced:
            same = (a == b for a, b in zip(hashes, self._seen, strict=False))
            kept = sum(takewhile(bool, same))
            del self._seen[kept:]
        self._seen += hashes[kept:]
        return [json.loads(line) for line in lines[kept:]]
