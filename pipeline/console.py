"""What a run shows while it works: stage headings, live progress lines, closing tables. Knows nothing of what the stages do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

Update = Callable[[int, int | None, str], None]


@dataclass
class Reporter:
    """Prints a run's progress, and remembers how long each stage took."""

    console: Console = field(default_factory=lambda: Console(highlight=False))
    stage_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A heading, and the time until the block ends."""
        self.console.print(f"[bold]{name}[/bold]")
        started = time.monotonic()
        yield
        self.stage_s[name] = round(time.monotonic() - started, 2)

    @contextmanager
    def progress(self, name: str) -> Iterator[Update]:
        """A live line: call the yielded function with (done, total or None, what to say beside it).

        Where the output is no terminal (a log file, CI), a plain line every ten seconds takes its place.
        """
        if not self.console.is_terminal:
            yield self._plain(name)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(name, total=None, said="")

            def update(done: int, total: int | None, said: str = "") -> None:
                bar.update(task, completed=done, total=total, said=said)

            yield update

    def _plain(self, name: str) -> Update:
        last = 0.0

        def update(done: int, total: int | None, said: str = "") -> None:
            nonlocal last
            finished = total is not None and done >= total
            if finished or time.monotonic() - last > 10:
                last = time.monotonic()
                of = f"/{total}" if total is not None else ""
                self.console.print(f"  {name} {done}{of} {said}".rstrip(), soft_wrap=True)

        return update

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A small table."""
        table = Table(title=title, title_justify="left", show_header=any(columns))
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
