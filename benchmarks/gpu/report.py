"""What was measured, as `gpu.json` and `gpu.md`: tables of rows by part, each part with its state.

Files are written whole after every row, so that whatever ends a run early leaves what it had.
Knows nothing of torch or of what the rows mean. Standard library only, and `flowreel.files`.

The JSON is `{"format", "parts": {NAME: {"state", "message", "seconds", "limit_s", "made",
"rehearsal", "environment", "tables": {TABLE: [row, ...]}}}}`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from flowreel.files import write_json, write_whole

FORMAT = "flowreel-gpu-1"
JSON_NAME = "gpu.json"
MARKDOWN_NAME = "gpu.md"

Row = dict[str, Any]
"""Column to plain value."""

RUNNING = "running"
COMPLETE = "complete"
FAILED = "failed"
OUT_OF_TIME = "out of time"
NOT_RUN = "not run"


@dataclass
class PartResult:
    """What one part has said so far.

    state: RUNNING, COMPLETE, FAILED, OUT_OF_TIME or NOT_RUN. message: why it is not complete.
    """

    state: str = NOT_RUN
    message: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    made: str = ""
    rehearsal: bool = False
    environment: Row = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def take(self, message: Row) -> None:
        """Keep what a part's process said: an environment, or a row of a table."""
        if "environment" in message:
            self.environment = message["environment"]
        else:
            self.tables.setdefault(message["table"], []).append(message["row"])


class Report:
    """The results of a folder; those of parts that are not run again stay.

    >>> import tempfile
    >>> report = Report(Path(tempfile.mkdtemp()))
    >>> report.parts["machine"] = PartResult(COMPLETE)
    >>> report.parts["machine"].take({"table": "figures", "row": {"what": "copy", "value": 3000.0}})
    >>> report.write()
    >>> Report(report.folder).parts["machine"].tables
    {'figures': [{'value': 3000.0, 'what': 'copy'}]}
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, PartResult] = _read(folder / JSON_NAME)

    def write(self) -> None:
        """Both files, each whole or as it was before."""
        parts = {name: asdict(result) for name, result in self.parts.items()}
        write_json(self.folder / JSON_NAME, {"format": FORMAT, "parts": parts})
        write_whole(self.folder / MARKDOWN_NAME, self.markdown())

    def markdown(self) -> str:
        """All tables, in the order of the parts."""
        results = [(part, self.parts[part.name]) for part in PARTS if part.name in self.parts]
        lines = ["# Figures of `python -m benchmarks.gpu`", ""]
        if any(result.rehearsal for _, result in results):
            lines += [
                "**A rehearsal on a CPU at toy shapes: no figure here says anything of a GPU.**",
                "",
            ]
        rows: list[Row] = [
            {
                "part": part.name,
                "state": result.state,
                "seconds": result.seconds,
                "limit_s": result.limit_s,
                "made": result.made,
                "device": result.environment.get("device", ""),
                "message": result.message.rpartition("\n")[2],
            }
            for part, result in results
        ]
        lines += [*table(rows), ""]
        for part, result in results:
            lines += [f"## {part.title}", ""]
            if result.state != COMPLETE:
                lines += [f"State: {result.state}. {_one_line(result.message)}", ""]
            if result.environment:
                facts = ", ".join(f"{key} {value}" for key, value in result.environment.items())
                lines += [_one_line(facts), ""]
            for name, part_rows in result.tables.items():
                lines += [f"### {name}", "", *table(part_rows), ""]
        return "\n".join(lines)


def _read(path: Path) -> dict[str, PartResult]:
    """The parts of an earlier report; none where there is no readable one."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return {}
    return {name: PartResult(**fields) for name, fields in values["parts"].items()}


def table(rows: list[Row]) -> list[str]:
    """Rows as a Markdown table, columns in the order in which they first appear.

    >>> table([{"window": 32, "floor_ms": 5.43219}, {"window": 64, "note": "a|b"}])
    ['| window | floor ms | note |', '|---|---|---|', '| 32 | 5.432 |  |', '| 64 |  | a/b |']
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return []
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    return lines


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return _one_line(str(value)).replace("|", "/")


def _one_line(text: str) -> str:
    return " ".join(text.split())
