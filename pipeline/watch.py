"""What a run does just now, from its history: `flowreel watch RUN` and `flowreel train --watch`.

Reads the run's folder and nothing else, so it works beside a run, on any machine that sees the
folder, and on a run that is over. Knows nothing of Ray or of how a run is trained.
"""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table

from flowreel.errors import FlowreelWarning
from pipeline.console import Reporter, duration, size
from training.curriculum import stage_in_work
from training.record.history import HISTORY_NAME, HistoryPlace, records_after
from training.run import (
    CONFIG_NAME,
    FINISHED_NAME,
    MODEL_NAME,
    SAMPLES_NAME,
    HistoryProgress,
    TrainRequest,
)
from training.state.checkpoint import CHECKPOINTS_NAME, MARKER_NAME

RECENT_STEPS = 50
"""Speeds and waits are over so many steps."""
CURVE_STEPS = 4000
"""So many losses are kept of each kind of step."""
CURVE_COLUMNS = 40
LINES_PER_READ = 1000
POLL_S = 0.5
BARS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float], columns: int = CURVE_COLUMNS) -> str:
    """A line of bars, each the median of its share of the values; empty for none.

    >>> curve([4.0, 3.0, 2.0, 1.0], columns=4), curve([1.0, 1.0])
    ('█▆▃▁', '▁▁')
    """
    columns = min(columns, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)] if columns else []
    heights = [statistics.median(values[a:b]) for a, b in itertools.pairwise(edges)]
    if not heights:
        return ""
    low, spread = min(heights), max(heights) - min(heights)
    scale = (len(BARS) - 1) / spread if spread else 0.0
    return "".join(BARS[round((height - low) * scale)] for height in heights)


class RunView:
    """What is known of a run; `refresh` reads what its folder has that is new.

    Args:
        out: the run's folder; it may not be there yet.
        steps: of the whole run; None: as the folder says.
    """

    def __init__(self, out: Path, steps: int | None = None) -> None:
        self.out = out
        self.steps = steps
        self.done = 0
        self.skipped = 0
        self.losses: dict[str, deque[tuple[int, float]]] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self.held_out: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        self._place = HistoryPlace()

    def refresh(self) -> None:
        """Read the lines that are new."""
        path = self.out / HISTORY_NAME
        while True:
            records, self._place = records_after(path, self._place, LINES_PER_READ)
            if not records:
                return
            for record in records:
                self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        step = int(record["step"])
        if step < self.done:
            self._go_back(step)
        self.done = step + 1
        self.skipped += int(record["skipped"])
        if record["loss_nats_per_dim"] is not None:
            kept = self.losses.setdefault(record["mode"], deque(maxlen=CURVE_STEPS))
            kept.append((step, record["loss_nats_per_dim"]))
        self.recent.append(record)
        if "held_out_nats_per_dim" in record:
            self.held_out = record
        if "rss_bytes" in record:
            self.memory = record

    def _go_back(self, step: int) -> None:
        """A resumed run takes steps again: the earlier ones of these never were."""
        for kept in self.losses.values():
            known = list(kept)
            kept.clear()
            kept.extend(known[: bisect.bisect_left(known, (step, float("-inf")))])
        again = [record for record in self.recent if record["step"] >= step]
        self.skipped -= sum(int(record["skipped"]) for record in again)
        earlier = [record for record in self.recent if record["step"] < step]
        self.recent.clear()
        self.recent.extend(earlier)

    @property
    def is_finished(self) -> bool:
        """Whether the run has exported its model, after all the steps that it is asked for."""
        note = self.out / FINISHED_NAME
        if not note.is_file():
            return False
        return int(json.loads(note.read_text())["steps"]) >= (self._total() or 0)

    def _total(self) -> int | None:
        config = self.out / CONFIG_NAME
        if self.steps is None and config.is_file():
            return int(json.loads(config.read_text())["all"]["steps"])
        return self.steps

    def rows(self, now_s: float) -> list[tuple[str, str]]:
        """What there is to say, in words; `now_s` in seconds since 1970."""
        if not self.recent:
            return [("state", "no step yet")]
        rows = [("state", self._state(now_s)), ("step", self._step())]
        if "stage" in self.recent[-1]:
            rows.append(("stage", str(self.recent[-1]["stage"])))
        rows += [(f"{mode} loss", self._loss(mode)) for mode in sorted(self.losses, reverse=True)]
        if self.held_out:
            rows += self._held_out()
        rows += [("speed", self._speed()), ("data wait", self._data_wait())]
        if self.memory:
            rows.append(("memory", self._memory()))
        if self.skipped:
            rows.append(("skipped", f"{self.skipped} steps"))
        rows.append(("checkpoint", self._checkpoint(now_s)))
        samples = self.out / SAMPLES_NAME
        if samples.is_dir():
            rows.append(("samples", str(samples)))
        return rows

    def _state(self, now_s: float) -> str:
        if self.is_finished:
            return "finished"
        silent_s = now_s - self.recent[-1].get("time_s", now_s)
        return f"last line {duration(silent_s)} ago"

    def _step(self) -> str:
        total = self._total()
        if total is None:
            return str(self.done)
        text = f"{self.done}/{total} ({self.done / total:.0%})"
        if self.done < total:
            text += f", {duration((total - self.done) * self._mean('step_s'))} left"
        return text

    def _mean(self, key: str) -> float:
        values = [record[key] for record in self.recent if record.get(key) is not None]
        return statistics.fmean(values) if values else 0.0

    def _loss(self, mode: str) -> str:
        values = [loss for _step, loss in self.losses[mode]]
        now, floor = statistics.median(values[-20:]), self.recent[-1]["noise_floor"]
        return f"{now:.3f} nats/dim, {now - floor:.3f} over the floor  {curve(values)}"

    def _held_out(self) -> list[tuple[str, str]]:
        record = self.held_out
        over = record["held_out_nats_per_dim"] - record["noise_floor"]
        text = f"{record['held_out_nats_per_dim']:.3f} nats/dim, {over:.3f} over the floor"
        buckets = {key.split("/")[1]: value for key, value in record.items() if "held_out/" in key}
        rows = [("held-out loss", f"{text}, after step {record['step'] + 1}")]
        if len(buckets) > 1:
            said = ", ".join(f"{bucket} {value:.3f}" for bucket, value in sorted(buckets.items()))
            rows.append(("by size", said))
        return rows

    def _speed(self) -> str:
        text = f"{self._mean('tokens_per_s'):,.0f} tokens/s, {self._mean('step_s'):.2f} s a step"
        if "mfu" in self.recent[-1]:
            text += f", MFU {self._mean('mfu'):.1%}"
        return text

    def _data_wait(self) -> str:
        step_s = self._mean("step_s")
        share = self._mean("data_wait_s") / step_s if step_s else 0.0
        return f"{share:.0%} of a step"

    def _memory(self) -> str:
        text = f"{size(self.memory['rss_bytes'])} of the first worker"
        if "device_peak_bytes" in self.memory:
            text += f", at most {size(self.memory['device_peak_bytes'])} on its device"
        return text

    def _checkpoint(self, now_s: float) -> str:
        # Only names: an older one may be removed in this moment.
        markers = sorted((self.out / CHECKPOINTS_NAME).glob(f"step_*/{MARKER_NAME}"))
        if not markers:
            return "none yet"
        step = int(markers[-1].parent.name.removeprefix("step_"))
        return f"step {step}, {duration(now_s - markers[-1].stat().st_mtime)} ago"

    def panel(self) -> RenderableType:
        """All of it as it is now, for a terminal."""
        self.refresh()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, text in self.rows(time.time()):
            table.add_row(name, text)
        return Panel(table, title=str(self.out), title_align="left", expand=False)


def _has_model(out: Path) -> bool:
    return (out / MODEL_NAME).is_dir()


def watch(out: Path, reporter: Reporter) -> None:
    """Show a run until it is finished, its stages in turn; without a terminal, once."""
    view = RunView(stage_in_work(out))
    if not reporter.as_json:
        with reporter.live(lambda: view.panel()) as is_live:
            # A run that walks stages has its own model when the last of them is done.
            while is_live and not (view.is_finished and (view.out == out or _has_model(out))):
                time.sleep(POLL_S)
                if view.out != (newest := stage_in_work(out)):
                    view = RunView(newest)
        if is_live:
            return
    view.refresh()
    rows = view.rows(time.time())
    reporter.table(str(view.out), ["", ""], [list(row) for row in rows], left=True)
    reporter.document(dict(rows))


@contextmanager
def training_shown(
    request: TrainRequest, reporter: Reporter, title: str, *, watch: bool
) -> Iterator[HistoryProgress | None]:
    """A panel of the run, which reads its history itself, or one line that takes new records.

    title: what the line is called.
    watch: the panel is wanted; without a terminal it is the line all the same.
    """
    steps = request.config.steps
    if watch:
        with reporter.live(RunView(request.out, steps).panel) as is_live:
            if is_live:
                yield None
                return
    with reporter.progress(title) as update:
        yield _steps(update, steps)


def _steps(update: Callable[[int, int, str], None], steps: int) -> HistoryProgress:
    """The progress of training: steps of steps, and the loss of the last video step."""
    loss = ""

    def show(records: list[dict[str, Any]]) -> None:
        nonlocal loss
        for record in records:
            for sentence in record.get("warnings", ()):
                warnings.warn(sentence, FlowreelWarning, stacklevel=2)
            # A step whose loss was not finite was skipped; its line keeps the loss before.
            if record["mode"] == "video" and record["loss_nats_per_dim"] is not None:
                loss = f"{record['loss_nats_per_dim']:.3f} nats/dim"
        update(records[-1]["step"] + 1, steps, loss)

    return show
