"""Training on Ray: the same loop in the workers of a `TorchTrainer`.

Only wires: the driver checks the run and opens its record, Ray Train starts `workers.count`
workers with a process group between them, each runs `training.loop.train`, the driver exports.
Progress is read from the run's history file, which all see, so it is live without a barrier per
step. Checkpoints are the loop's own: whatever dies, the next start finds the newest complete one.
Knows nothing of losses, optimizers or what a checkpoint holds.

    FlowreelError, RuntimeError
    └── TrainingFailed    workers failed; the message is the first one's own error
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from flowreel.errors import FlowreelError
from training.config import TrainConfig
from training.loop import TrainJob, train
from training.parallel import choose_backend
from training.record.history import HistoryTail
from training.run import (
    HistoryProgress,
    Look,
    TrainingRun,
    TrainRequest,
    TrainResult,
    check_run,
    conclude,
    mlflow_record,
)
from training.sections import WorkerConfig
from training.state.run_lock import lock_run
from training.state.stop import STOP_NAME, Ask, Notice, stop_signals

POLL_S = 0.5
# Ray Train looks after its workers this often; its default of 2 s is felt at the end of a short
# run.
HEALTH_CHECK_S = "0.5"
# A busy laptop needs more than the default minute to start workers that import torch.
START_TIMEOUT_S = "300"
# Failures to start the workers at all; Ray Train's own default is to try for ever.
START_ATTEMPTS = 2


class TrainingFailed(FlowreelError, RuntimeError):
    """Training on Ray stopped; the message is the first worker's own error.

    Attributes:
        rank: the worker it came from; -1 when it was none.
    """

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank

    def __reduce__(self) -> tuple[type[TrainingFailed], tuple[str, int]]:
        return type(self), (self.message, self.rank)


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker does; its return value on worker 0 goes back to the driver."""
    config, job = TrainConfig(**settings["config"]), TrainJob.from_dict(settings["job"])
    ending = train(
        config,
        job,
        report=lambda record: ray.train.report(record),
        ask=_asked(config, job),
    )
    return {"resumed_from": ending.resumed_from, "stopped": ending.stopped}


def _asked(config: TrainConfig, job: TrainJob) -> Ask:
    """What the driver's file asks of a worker, and Ray when it is about to take machines away."""
    request, calls = job.out / STOP_NAME, itertools.count(1)

    def ask() -> Notice:
        told = Notice.NONE
        # A round through an actor for all workers, so not at every step, but alike on all of them.
        if next(calls) % config.tracking.every_steps == 0 and ray.train.get_preemption_info():
            told = Notice.SAVE
        return Notice.STOP if request.exists() else told

    return ask


def _settings(job: TrainJob, config: TrainConfig) -> dict[str, Any]:
    """What every worker is told, as plain values: they travel as JSON."""
    return {"config": config.model_dump(mode="json"), "job": job.to_dict()}


@contextmanager
def _show_history(history: Path, progress: HistoryProgress | None) -> Iterator[None]:
    """Hand new history lines to `progress` from a thread while the body runs."""
    if progress is None:
        yield
        return
    tail, stop = HistoryTail(history), threading.Event()
    tail.new_records()  # Lines of an earlier call were shown then.

    def watch() -> None:
        while not stop.wait(POLL_S):
            if records := tail.new_records():
                progress(records)

    thread = threading.Thread(target=watch, name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        # What the workers wrote since the thread last looked.
        if records := tail.new_records():
            progress(records)


def _first_failure(error: TrainingFailedError) -> TrainingFailed:
    """The error that started it: when one worker dies, the others fail only in talking to it."""
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return TrainingFailed(str(error))

    def is_echo(failure: Exception) -> bool:
        text = str(failure)
        return any(word in text for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer"))

    ranks = sorted(error.worker_failures, key=lambda r: (is_echo(error.worker_failures[r]), r))
    failure = error.worker_failures[ranks[0]]
    cause = getattr(failure, "cause", None) or failure.__cause__ or failure
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    name = type(cause).__name__
    reason = last if last.startswith(name) else f"{name}: {last}"
    return TrainingFailed(f"training worker {ranks[0]} failed: {reason}", ranks[0])


def _number(workers: WorkerConfig) -> int | tuple[int, int]:
    """The number of processes, or the fewest and the most of an elastic run."""
    return workers.count if workers.min_count is None else (workers.min_count, workers.count)


def _choose_backend(workers: WorkerConfig) -> WorkerConfig:
    """`backend: auto` decided by what the cluster has, so that driver and workers agree."""
    gpus = ray.cluster_resources().get("GPU", 0)
    return workers.model_copy(update={"backend": choose_backend(workers, gpus)})


class _Trainer(TorchTrainer):
    """Ray Train without its own handler of Ctrl-C, which would kill the workers unsaved."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave ours (`stop_signals`) in place."""


def _trainer(run: TrainingRun) -> TorchTrainer:
    """The run as Ray Train sees it."""
    workers = _choose_backend(run.config.workers)
    return _Trainer(
        _work,
        train_loop_config=_settings(run.job, run.config.model_copy(update={"workers": workers})),
        torch_config=TorchConfig(backend=workers.backend),
        scaling_config=ScalingConfig(
            num_workers=_number(workers),
            use_gpu=workers.backend == "nccl",
            resources_per_worker={"CPU": workers.threads},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run.out.resolve()),
            failure_config=FailureConfig(
                max_failures=workers.max_failures, controller_failure_limit=START_ATTEMPTS
            ),
        ),
    )


def train_on_ray(
    request: TrainRequest, *, progress: HistoryProgress | None = None, look: Look | None = None
) -> TrainResult:
    """Train with `workers.count` Ray workers; or go on with the run in `out`, or find it finished.

    Uses the Ray cluster this process is connected to, or starts one that ends with this process.

    Args:
        request: what is to be trained, on what, how, and where to.
        progress: called in a thread of the driver with new history records, about twice a second.
        look: called in the driver with the exported model; its files become artifacts in MLflow.

    Raises:
        RunError, VideoMismatch, CheckpointMismatch, ParallelError: before any worker is started.
        RunBusy: another process trains into `out`.
        Terminated, KeyboardInterrupt: asked to stop, after a checkpoint was written.
        TrainingFailed: a worker failed more than `workers.max_failures` times.
    """
    run = check_run(request)
    earlier = run.finished()
    if earlier is not None:
        return earlier
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_S)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    if not ray.is_initialized():
        workers = run.config.workers
        ray.init(
            num_cpus=workers.count * workers.threads, include_dashboard=False, log_to_driver=False
        )
    with lock_run(run.out), mlflow_record(run) as feed:
        trainer = _trainer(run)
        try:
            with _show_history(run.job.history, progress), stop_signals(run.out) as signals:
                result = trainer.fit()
                if (result.return_value or {}).get("stopped"):
                    signals.leave()
        except TrainingFailedError as error:
            raise _first_failure(error) from error
        resumed_from = (result.return_value or {}).get("resumed_from")
        return conclude(run, resumed_from, feed, look)
