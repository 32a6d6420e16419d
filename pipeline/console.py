"""What a command shows: words, live progress with the time left, outcomes as tables or JSON.

Outcomes go to standard output, progress to standard error. With JSON, standard output holds the
JSON document alone. Knows nothing of what the stages do.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Update = Callable[[int, int | None, str], None]

PLAIN_LINE_EVERY_S = 10.0
"""How often progress is said where standard error is no terminal."""
SPEED_WINDOW_S = 120.0
"""The time left is estimated from the speed of this long; a training step may take seconds."""


@dataclass
class Reporter:
    """Says what a command does and what came of it, and remembers how long each stage took.

    quiet: only outcomes, no words on the way and no progress; as_json: the outcome is one JSON
    document on standard output, and everything else goes to standard error; console: where words
    and tables go instead (a quiet one shows no progress either).

    >>> reporter = Reporter(quiet=True)
    >>> reporter.say("not shown, since it is no outcome")
    >>> reporter.outcome("2 clips")
    2 clips
    """

    quiet: bool = False
    as_json: bool = False
    console: Console | None = None
    stage_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Kept, because while JSON is wanted `sys.stdout` is turned to standard error.
        self._out = sys.stdout
        # Paths and prompts are said as they are: a `[name]` in one of them is no markup.
        plain_text: dict[str, Any] = {"highlight": False, "markup": False}
        self._words = self.console or Console(stderr=self.as_json, **plain_text)
        self._errors = Console(stderr=True, **plain_text)

    def say(self, text: str, style: str | None = None) -> None:
        """A word on the way; silent where only outcomes are wanted."""
        if not self.quiet:
            self._words.print(text, style=style, soft_wrap=True)

    def outcome(self, text: str) -> None:
        """A line of what came of it; with JSON it is a word on the way."""
        if not (self.quiet and self.as_json):
            self._words.print(text, soft_wrap=True)

    def table(
        self, title: str, columns: list[str], rows: list[list[str]], *, left: bool = False
    ) -> None:
        """A small table of what came of it; with JSON it is a word on the way.

        left: columns of words; else all but the first hold numbers, and stand to the right.
        """
        if self.quiet and self.as_json:
            return
        # A table's own title would be wrapped at the width of its columns.
        self._words.print(title, style="italic", soft_wrap=True)
        table = Table(show_header=any(columns))
        for index, column in enumerate(columns):
            to_the_left = left or index == 0
            table.add_column(column, justify="left" if to_the_left else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._words.print(table)

    def document(self, values: object) -> None:
        """The outcome as JSON on standard output, where it was asked for."""
        if self.as_json:
            text = json.dumps(plain(values), indent=1, allow_nan=False)
            print(text, file=self._out, flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A heading, and the time until the block ends."""
        self.say(name, style="bold")
        started = time.monotonic()
        yield
        self.stage_s[name] = round(time.monotonic() - started, 2)

    @contextmanager
    def progress(self, name: str, *, timed: bool = True) -> Iterator[Update]:
        """A live line on standard error: call the yielded function with what is done so far.

        Its arguments are the count, the total or None, and what to say beside them. Where standard
        error is no terminal (a log file, CI), a plain line every ten seconds takes its place. Not
        `timed`: what is said tells the time left itself.
        """
        if self.quiet or self._words.quiet:
            yield lambda _done, _total, _said: None
        elif not self._errors.is_terminal:
            yield PlainProgress(name, self._errors.print, timed=timed).update
        else:
            with self._live(name, timed=timed) as update:
                yield update

    @contextmanager
    def live(self, picture: Callable[[], RenderableType]) -> Iterator[bool]:
        """Show a picture on standard error, drawn anew twice a second while the body runs.

        Yields False and shows nothing where standard error is no terminal, or where only outcomes
        are wanted.
        """
        if self.quiet or self._words.quiet or not self._errors.is_terminal:
            yield False
            return
        with Live(get_renderable=picture, console=self._errors, refresh_per_second=2):
            yield True

    @contextmanager
    def _live(self, name: str, *, timed: bool) -> Iterator[Update]:
        columns: list[ProgressColumn] = [SpinnerColumn()]
        if timed:
            columns += [
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[said]}", markup=False),
            ]
        else:
            # One column of words: of several, a narrow terminal would crush all.
            words = "{task.description} {task.fields[count]} {task.fields[said]}"
            columns += [TextColumn(words, markup=False)]
        bar = Progress(*columns, console=self._errors, speed_estimate_period=SPEED_WINDOW_S)
        with bar:
            task = bar.add_task(name, total=None, count="", said="")

            def update(done: int, total: int | None, said: str = "") -> None:
                count = _count(done, total)
                bar.update(task, completed=done, total=total, count=count, said=said)

            yield update


class PlainProgress:
    """Progress for a log file: now and then a line, with the time left once the speed is known.

    >>> clock = iter([0.0, 5.0, 12.0]).__next__
    >>> progress = PlainProgress("training", lambda text, **_: print(text), clock)
    >>> for step in (100, 101, 106):
    ...     progress.update(step, 1000)
      training 100/1000
      training 106/1000, 30 min left
    """

    def __init__(
        self,
        name: str,
        say: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
        *,
        timed: bool = True,
    ) -> None:
        self._name, self._say, self._clock, self._timed = name, say, clock, timed
        self._first: tuple[float, int] | None = None
        self._last_s = -math.inf

    def update(self, done: int, total: int | None, said: str = "") -> None:
        """Say it if it is the end, or if the last line is ten seconds old."""
        now = self._clock()
        # A resumed run starts somewhere in the middle: only what this run did tells its speed.
        self._first = self._first or (now, done)
        if total != done and now - self._last_s < PLAIN_LINE_EVERY_S:
            return
        self._last_s = now
        text = f"  {self._name} {_count(done, total)} {said}".rstrip()
        began_s, began = self._first
        if self._timed and total is not None and began < done < total:
            left_s = (total - done) * (now - began_s) / (done - began)
            text += f", {duration(left_s)} left"
        self._say(text, soft_wrap=True)


def _count(done: int, total: int | None) -> str:
    return f"{done}/{total}" if total is not None else str(done)


def duration(seconds: float) -> str:
    """A length of time, roughly, for people.

    >>> duration(0.4), duration(59.7), duration(1788), duration(90000)
    ('1 s', '1 min', '30 min', '25 h')
    """
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{round(seconds / 3600)} h"


def size(count: int) -> str:
    """Bytes for people.

    >>> size(999), size(36_000_000_000_000)
    ('999 B', '36.0 TB')
    """
    value, units = float(count), ["kB", "MB", "GB", "TB", "PB"]
    if value < 1000:
        return f"{count} B"
    while value >= 1000 and units:
        value, unit = value / 1000, units.pop(0)
    return f"{value:.1f} {unit}"


def plain(value: Any) -> Any:
    """Values as JSON holds them: dataclasses become maps, paths text, numbers that are none null.

    >>> from pathlib import Path
    >>> plain({"path": Path("a"), "loss": float("nan"), ("kept", ""): (1, 2)})
    {'path': 'a', 'loss': None, 'kept': [1, 2]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and torch, without importing them
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _key(key: object) -> str:
    return " ".join(str(part) for part in key if part) if isinstance(key, tuple) else str(key)
