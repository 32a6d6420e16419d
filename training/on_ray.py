"""Training on Ray: the same loop in the workers of a `TorchTrainer`.

Only wires: the driver checks the run and opens its record, Ray Train starts `config.workers`
workers with a process group between them, each runs `training.loop.train`, the driver exports.
Progress is read from the run's history file, which all see, so it is live without a barrier per
step. Checkpoints are the loop's own: whatever dies, the next start finds the newest complete one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from flow.config import FlowConfig
from flow.model_folder import VideoSpec
from flow.text import TextSpec
from flowreel.errors import FlowreelError
from training.config import TrainConfig
from training.history import HistoryTail
from training.loop import TrainJob, train
from training.run import Run, TrainResult, check_run, conclude, recorded
from training.tracking import TrackingRun

Progress = Callable[[list[dict[str, Any]]], None]
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
    tracking = settings["tracking"]
    ended = train(
        TrainConfig(**settings["config"]),
        TrainJob(
            FlowConfig.from_dict(settings["flow"]),
            TextSpec(**settings["text"]),
            settings["dataset"],
            Path(settings["out"]),
        ),
        report=lambda record: ray.train.report(record),
        tracking=None if tracking is None else TrackingRun(**tracking),
    )
    return {"resumed_from": ended.resumed_from}


def _settings(run: Run, config: TrainConfig, tracking: TrackingRun | None) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "flow": run.job.flow.to_dict(),
        "text": run.job.text.to_dict(),
        "dataset": str(run.job.dataset),
        "out": str(run.out.resolve()),
        "tracking": None if tracking is None else {"uri": tracking.uri, "run_id": tracking.run_id},
    }


@contextmanager
def _watched(history: Path, progress: Progress | None) -> Iterator[None]:
    """Hand new history lines to `progress` from a thread while the body runs."""
    if progress is None:
        yield
        return
    tail, done = HistoryTail(history), threading.Event()
    tail.new_records()  # Lines of an earlier call were shown then.

    def watch() -> None:
        while not done.wait(POLL_S):
            if records := tail.new_records():
                progress(records)

    thread = threading.Thread(target=watch, name="progress")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
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
    said = last if last.startswith(name) else f"{name}: {last}"
    return TrainingFailed(f"training worker {ranks[0]} failed: {said}", ranks[0])


def _resolved(config: TrainConfig) -> tuple[TrainConfig, bool]:
    """`backend: auto` decided by what the cluster has, so that driver and workers agree."""
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = config.backend == "nccl" or (config.backend == "auto" and gpus >= config.workers)
    backend = "nccl" if use_gpu else "gloo"
    return config.model_copy(update={"backend": backend}), use_gpu


def train_on_ray(
    config: TrainConfig,
    flow: FlowConfig,
    text: TextSpec,
    video: VideoSpec | None,
    dataset: str | Path,
    codec: Path | None,
    out: Path,
    *,
    progress: Progress | None = None,
) -> TrainResult:
    """Train with `config.workers` Ray workers, or go on with, or find finished, the run in `out`.

    Uses the Ray cluster this process is connected to, or starts one that ends with this process.

    Args:
        dataset: folder of latents, path or URI.
        out: the run's folder; on a cluster of several machines, on storage they share.
        progress: called in a thread of the driver with new history records, about twice a second.

    Raises:
        RunError, CheckpointMismatch: before any worker is started.
        TrainingFailed: a worker failed more than `max_worker_failures` times.
    """
    run = check_run(config, flow, text, video, dataset, codec, Path(out))
    if (done := run.finished()) is not None:
        return done
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_S)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    if not ray.is_initialized():
        ray.init(
            num_cpus=config.workers * config.threads_per_worker,
            include_dashboard=False,
            log_to_driver=False,
        )
    resolved, use_gpu = _resolved(config)
    with recorded(run) as tracking:
        trainer = TorchTrainer(
            _work,
            train_loop_config=_settings(run, resolved, tracking),
            torch_config=TorchConfig(backend=resolved.backend),
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": config.threads_per_worker},
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(run.out.resolve()),
                failure_config=FailureConfig(
                    max_failures=config.max_worker_failures,
                    controller_failure_limit=START_ATTEMPTS,
                ),
            ),
        )
        try:
            with _watched(run.job.history, progress):
                result = trainer.fit()
        except TrainingFailedError as error:
            raise _first_failure(error) from error
        resumed = (result.return_value or {}).get("resumed_from")
        return conclude(run, resumed, tracking)
