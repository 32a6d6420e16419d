"""What a worker measures of its steps becomes lines of the history, at reports.

Knows steps and their costs. Knows nothing of Ray or MLflow.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flow.likelihood import noise_floor
from training.data.batch_sampler import StepPlan
from training.record.device import StepClock, StepTime, memory_of
from training.record.history import History
from training.record.metrics import StepCost, step_cost
from training.state.choice import CheckpointWarning
from training.step import StepMetrics, StepWarning, TrainStep


@dataclass(frozen=True)
class _Pending:
    """A step that was taken, and not written down yet."""

    metrics: StepMetrics
    when: StepTime
    cost: StepCost
    ids: tuple[str, ...]
    extra: dict[str, Any]


class Recorder:
    """Gathers a worker's step metrics and writes them out (worker 0) at reports.

    Args:
        step: whose steps they are.
        history: the file.
        start: first step to come.
    """

    def __init__(self, step: TrainStep, history: Path, start: int) -> None:
        first = step.parallel.is_first
        self.step = step
        self.noise_floor = noise_floor(step.model.config.noise_std)
        self.history = History(history, start) if first else None
        self.clock = StepClock(step.parallel.device)
        self.last: dict[str, Any] = {}
        self._pending: list[_Pending] = []
        self._notes: list[str] = []

    def add(
        self, metrics: StepMetrics, when: StepTime, cost: StepCost, ids: tuple[str, ...]
    ) -> None:
        """Take a step's metrics, without waiting for the device, and the ids of its samples."""
        extra: dict[str, Any] = {"warnings": self._notes} if self._notes else {}
        self._notes = []
        self._pending.append(_Pending(metrics, when, cost, ids, extra))

    def note(self, sentence: str | None, *, warn: bool = True) -> None:
        """Warn, and write it into the history beside the next step, in `warnings`."""
        if sentence is not None and self.history is not None:
            self._notes.append(sentence)
            if warn:
                warnings.warn(sentence, CheckpointWarning, stacklevel=2)

    def annotate(self, extra: dict[str, Any]) -> None:
        """Add values to the newest step."""
        self._pending[-1].extra.update(extra)

    def _name_skipped(self, record: dict[str, Any], ids: tuple[str, ...]) -> None:
        """Name the samples of a skipped step; of several in a row, the first warns."""
        record["skipped_samples"] = list(ids)
        if record["skipped_in_a_row"] == 1 and self.history is not None:
            sentence = self.step.skip_sentence(record, ids)
            record["warnings"] = [*record.get("warnings", []), sentence]
            warnings.warn(sentence, StepWarning, stacklevel=2)

    def flush(self, *, durable: bool = False) -> OSError | None:
        """Write what was gathered; `durable` waits until it would outlive a power cut.

        Every worker reads its metrics here, and so stops with the others. Gives what kept this one
        from writing; the lines are written with the next ones then.
        """
        records: list[dict[str, Any]] = []
        for one in self._pending:
            record = {**one.metrics.record(), "noise_floor": self.noise_floor}
            record |= {**self._speed(one.when, one.cost), **one.extra}
            if record["skipped"]:
                self._name_skipped(record, one.ids)
            records.append(record)
        self._pending.clear()
        if records:
            records[-1].update(memory_of(self.clock.device))
            self.last = records[-1]
        failure = None
        if self.history is not None:
            try:
                self.history.append(records, durable=durable)
            except OSError as error:
                failure = error
        for record in records:
            self.step.check_skips(record)
        return failure

    def _speed(self, when: StepTime, cost: StepCost) -> dict[str, float]:
        """Times of a step, tokens per second, and MFU where the peak is known."""
        step_s = self.clock.seconds(when.start, when.end)
        speed = {
            "time_s": when.time_s,
            "step_s": step_s,
            "data_wait_s": when.data_wait_s,
            "tokens_per_s": cost.tokens / step_s,
            "flops_per_s": (cost.matmul_flops + cost.attention_flops) / step_s,
        }
        peak = self.step.config.tracking.peak_flops_per_device
        if peak is not None:
            speed.update(cost.utilisation(step_s, peak * self.step.parallel.world))
        return speed


def cost_of(step: TrainStep, plan: StepPlan, shape: torch.Size) -> StepCost:
    """What a step on a share of this shape costs all workers."""
    frames = shape[1] if len(shape) == 5 else 1
    return step_cost(
        step.model,
        step.model.config,
        batch=len(plan.ids),
        frames=frames,
        height=shape[-2],
        width=shape[-1],
        with_denoiser=step.trains_denoiser(plan.step),
    )
