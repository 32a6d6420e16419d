"""A whole training run as its driver sees it: checked, recorded, trained, exported; in one process
here.

`on_ray.py` puts workers in the place of the one process and shares everything else. A run that is
finished is found so and not repeated; one that was killed goes on from its last complete
checkpoint. Knows nothing of Ray.

    ValueError
    └── RunError    a dataset, codec or model that do not belong together
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.latents.dataset import LatentDataset
from flow.codec import VideoCodec
from flow.config import FlowConfig
from flow.model_folder import ModelSpec, VideoSpec
from flow.text import TextSpec
from flowreel.errors import FlowreelError
from training.checkpoint import (
    CODEC_FOLDER,
    Checkpoint,
    check_fits,
    export_model,
    latest_complete,
    write_json,
)
from training.config import TrainConfig
from training.loop import TrainJob, describe, run_digest, train
from training.tracking import TrackingRun, close_run, open_run

MODEL_NAME = "model"
FINISHED_NAME = "finished.json"
CONFIG_NAME = "train.json"
Progress = Callable[[list[dict[str, Any]]], None]


class RunError(FlowreelError, ValueError):
    """A dataset, a codec and a model that do not belong together."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind.

    Attributes:
        model_dir: the averaged weights as `flow.model_folder.load_model` reads them, codec inside.
        checkpoint_dir: the last checkpoint.
        steps: steps taken in all.
        resumed_from: step this call went on from; None for a fresh run, `steps` where there was
            nothing to do.
        mlflow_run_id: the run's record; None where tracking is off.
        history: JSON lines, one per step (`training.history.read_history`).
    """

    model_dir: Path
    checkpoint_dir: Path
    steps: int
    resumed_from: int | None
    mlflow_run_id: str | None
    history: Path


@dataclass(frozen=True)
class Run:
    """A checked run.

    Attributes:
        config, job: how, what and where.
        spec: what the exported model says of itself.
        codec: folder of the codec that goes with it.
        description: what a checkpoint must agree with.
    """

    config: TrainConfig
    job: TrainJob
    spec: ModelSpec
    codec: Path | None
    description: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.job.out

    @property
    def digest(self) -> str:
        return run_digest(self.description, self.config.steps)

    def finished(self) -> TrainResult | None:
        """The result of an earlier call that finished this very run, or None."""
        note = self.out / FINISHED_NAME
        if not note.is_file() or not (self.out / MODEL_NAME).is_dir():
            return None
        values = json.loads(note.read_text())
        latest = latest_complete(self.job.checkpoints)
        if values["digest"] != self.digest or latest is None or latest.step != values["steps"]:
            return None
        return self.result(latest, latest.step, values["mlflow_run_id"])

    def result(
        self, checkpoint: Checkpoint, resumed: int | None, run_id: str | None
    ) -> TrainResult:
        return TrainResult(
            self.out / MODEL_NAME,
            checkpoint.path,
            checkpoint.step,
            resumed,
            run_id,
            self.job.history,
        )


def check_run(
    config: TrainConfig,
    flow: FlowConfig,
    text: TextSpec,
    video: VideoSpec | None,
    dataset: str | Path,
    codec: Path | None,
    out: Path,
) -> Run:
    """Everything that can be wrong before a worker is started.

    Raises:
        RunError: naming the two things that do not fit, with both values.
        CheckpointMismatch: `out` holds checkpoints of another run.
    """
    latents = LatentDataset(dataset, split="train")
    info = latents.info
    if info.latent_channels != flow.latent_channels:
        raise RunError(
            f"flow.latent_channels is {flow.latent_channels}, but {dataset} holds latents of "
            f"{info.latent_channels} channels; set it to that"
        )
    if (text.length, text.dim) != (flow.text_len, flow.text_dim):
        raise RunError(
            f"the text encoder gives {text.length} vectors of {text.dim}, but the flow reads "
            f"{flow.text_len} of {flow.text_dim}; make text and flow agree"
        )
    if codec is not None and (digest := VideoCodec.load(codec).digest) != info.codec_digest:
        raise RunError(
            f"{dataset} was encoded by codec {info.codec_digest}, but {codec} is {digest}; "
            "train with the codec the latents were made with, or prepare them again"
        )
    job = TrainJob(flow, text, latents.folder.location, Path(out))
    description = describe(config, job, latents)
    latest = latest_complete(job.checkpoints)
    if latest is not None:
        check_fits(latest, description)
        if latest.step > config.steps:
            raise RunError(
                f"{latest.path} is at step {latest.step}, past steps {config.steps}; "
                "raise steps, or train into another folder"
            )
    spec = ModelSpec(
        flow=flow,
        text=text,
        codec=None if codec is None else CODEC_FOLDER,
        codec_digest=info.codec_digest,
        latents=info.convention,
        video=video,
    )
    return Run(config, job, spec, codec, description)


@contextmanager
def recorded(run: Run) -> Iterator[TrackingRun | None]:
    """The run's MLflow record, open for the time of the training; closed as failed on an
    exception.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    write_json(
        run.out / CONFIG_NAME, {**run.description, "all": run.config.model_dump(mode="json")}
    )
    tracking = open_run(
        run.config,
        run.out,
        params={"train": run.config.model_dump(), **_without(run.description, "train")},
        dataset=run.job.dataset,
        dataset_digest=run.description["dataset"]["samples"],
    )
    try:
        yield tracking
    except BaseException:
        close_run(tracking, ok=False)
        raise


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != key}


def conclude(run: Run, resumed: int | None, tracking: TrackingRun | None) -> TrainResult:
    """Export the trained model and mark the run finished; in the driver, after the workers are
    gone.
    """
    latest = latest_complete(run.job.checkpoints)
    assert latest is not None, "a finished loop leaves a checkpoint"
    export_model(latest, run.spec, run.codec, run.out / MODEL_NAME)
    run_id = tracking.run_id if tracking else None
    result = run.result(latest, resumed, run_id)
    close_run(
        tracking,
        ok=True,
        tags={"model_dir": str(result.model_dir), "steps": str(result.steps)},
        artifacts=[run.out / CONFIG_NAME, run.job.history],
    )
    write_json(
        run.out / FINISHED_NAME,
        {"digest": run.digest, "steps": result.steps, "mlflow_run_id": run_id},
    )
    return result


def train_in_process(
    config: TrainConfig,
    flow: FlowConfig,
    text: TextSpec,
    video: VideoSpec | None,
    dataset: str | Path,
    codec: Path | None,
    out: Path,
) -> TrainResult:
    """A whole run in this process (strategy `single`); the same as on Ray but for the workers.

    Raises:
        RunError, CheckpointMismatch, SkippedTooOften, SamplerError: see `check_run` and
            `loop.train`.
    """
    if config.strategy != "single":
        raise RunError(f"strategy is {config.strategy!r}; one process needs 'single'")
    run = check_run(config, flow, text, video, dataset, codec, out)
    if (done := run.finished()) is not None:
        return done
    with recorded(run) as tracking:
        ended = train(config, run.job, tracking=tracking)
        return conclude(run, ended.resumed_from, tracking)
