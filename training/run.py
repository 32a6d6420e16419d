"""A whole training run as its driver sees it: checked, tracked, trained, exported.

Here the training is done in one process; `on_ray.py` puts workers in its place and shares all the
rest. A run that was finished before is not repeated; one that was killed goes on from its last
complete checkpoint. Knows nothing of Ray.

    FlowreelError, ValueError
    ├── RunError         a dataset, a codec and a model that do not belong together
    └── VideoMismatch    see `stated_video.py`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.latents.dataset import LatentDataset
from flow.codec import VideoCodec, codec_folder
from flow.codec_factors import WAN_FACTORS, CodecFactors, read_factors
from flow.config import FlowConfig
from flow.model_folder import ModelSpec
from flow.text import TextSpec
from flowreel.errors import FlowreelError
from flowreel.files import write_json
from flowreel.values import digest_of
from training.config import TrainConfig
from training.data.batch_sampler import uneven
from training.data.latents import open_latents
from training.data.texts import find_texts
from training.loop import TrainJob, describe, settle_precision, train
from training.record.tracking import MlflowRun, close_mlflow_run, open_mlflow_run
from training.state.checkpoint import (
    CODEC_FOLDER,
    Checkpoint,
    check_fits,
    export_model,
    latest_complete,
)
from training.stated_video import StatedVideo, video_spec

MODEL_NAME = "model"
FINISHED_NAME = "finished.json"
CONFIG_NAME = "train.json"
HistoryProgress = Callable[[list[dict[str, Any]]], None]
"""Takes the lines that are new in a run's history."""


class RunError(FlowreelError, ValueError):
    """A dataset, a codec and a model that do not belong together."""


@dataclass(frozen=True)
class TrainRequest:
    """What is to be trained, on what, how, and where to.

    Attributes:
        config: how it is trained.
        flow, text: the model, and the text encoder that it reads.
        dataset: folder of prepared latents, path or URI.
        out: the run's folder; on a cluster of several machines, on storage they share.
        codec: folder or hub id of the codec that made the latents, copied beside the model; None:
            no codec.
        video: what is stated of the clips; the dataset decides the rest (`video_spec`).
    """

    config: TrainConfig
    flow: FlowConfig
    text: TextSpec
    dataset: str | Path
    out: Path
    codec: Path | None = None
    video: StatedVideo = StatedVideo()  # noqa: RUF009 - frozen


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
        history: JSON lines, one per step (`training.record.history.read_history`).
    """

    model_dir: Path
    checkpoint_dir: Path
    steps: int
    resumed_from: int | None
    mlflow_run_id: str | None
    history: Path


@dataclass(frozen=True)
class TrainingRun:
    """A checked request.

    Attributes:
        request: what was asked for.
        job: what a worker is given.
        spec: what the exported model says of itself.
        description: what a checkpoint must agree with.
        notes: what a user should know before a long run, a line each: buckets that are too small,
            samples that are seen far more often than others, where text is encoded.
    """

    request: TrainRequest
    job: TrainJob
    spec: ModelSpec
    description: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> TrainConfig:
        """How it is trained."""
        return self.request.config

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.job.out

    @property
    def digest(self) -> str:
        """Names the run's end: what is trained, for how long, and which videos it makes."""
        values = {"description": self.description, "steps": self.config.steps}
        return digest_of({**values, "video": self.spec.to_dict()["video"]})

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
        self, checkpoint: Checkpoint, resumed_from: int | None, mlflow_run_id: str | None
    ) -> TrainResult:
        """The result, given the last checkpoint."""
        return TrainResult(
            self.out / MODEL_NAME,
            checkpoint.path,
            checkpoint.step,
            resumed_from,
            mlflow_run_id,
            self.job.history,
        )


def check_run(request: TrainRequest) -> TrainingRun:
    """Find what is wrong with a request before a worker is started, or anything written.

    Raises:
        RunError: naming the two things that do not fit, with both values.
        VideoMismatch: the videos that are stated are not those of the dataset.
        CheckpointMismatch: `out` holds checkpoints of another run.
        BatchSamplerError: batches cannot be drawn from the dataset as the settings say.
    """
    latents = open_latents(request.dataset, "train", request.config.batches.resolution)
    spec = _model_spec(request, latents)
    job = TrainJob(
        request.flow, request.text, latents.folder.location, Path(request.out), _factors(request)
    )
    views = job.sampler(request.config, latents.buckets).views(request.config.steps)
    description = describe(request.config, job, latents)
    latest = latest_complete(job.checkpoints)
    if latest is not None:
        settled = settle_precision(request.config, latest)
        check_fits(latest, describe(settled, job, latents))
        if latest.step > request.config.steps:
            raise RunError(
                f"{latest.path} is at step {latest.step}, past train.steps "
                f"{request.config.steps}; raise train.steps, or train into another folder"
            )
    _texts, line = find_texts(job.text, job.flow, request.config.batches, job.dataset)
    notes = (*uneven(views), *([line] if line else []))
    return TrainingRun(request, job, spec, description, notes)


def _factors(request: TrainRequest) -> CodecFactors:
    return WAN_FACTORS if request.codec is None else read_factors(request.codec)


def _model_spec(request: TrainRequest, latents: LatentDataset) -> ModelSpec:
    """What the exported model will say of itself; refuses parts that do not go together."""
    flow, text, codec, info = request.flow, request.text, request.codec, latents.info
    if info.latent_channels != flow.latent_channels:
        raise RunError(
            f"model.latent_channels is {flow.latent_channels}, but {request.dataset} holds latents "
            f"of {info.latent_channels} channels; set it to that"
        )
    if (text.length, text.dim) != (flow.text_len, flow.text_dim):
        raise RunError(
            f"the text encoder gives {text.length} vectors of {text.dim}, but the flow reads "
            f"{flow.text_len} of {flow.text_dim}; make text and flow agree"
        )
    longest = 1 if not flow.video else request.config.batches.frames
    video = video_spec(latents, request.video, _factors(request), longest=longest)
    # Last, for it reads the codec's weights.
    digest = info.codec_digest if codec is None else VideoCodec.load(codec).digest
    if digest != info.codec_digest:
        raise RunError(
            f"{request.dataset} was encoded by codec {info.codec_digest}, but {codec} is {digest}; "
            "train with the codec the latents were made with, or prepare them again"
        )
    return ModelSpec(
        flow=flow,
        text=text,
        codec=None if codec is None else CODEC_FOLDER,
        codec_digest=digest,
        latents=info.convention,
        video=video,
    )


@contextmanager
def mlflow_record(run: TrainingRun) -> Iterator[MlflowRun | None]:
    """The MLflow run, open while the body trains; closed as failed where it raises."""
    run.out.mkdir(parents=True, exist_ok=True)
    settings = {**run.description, "all": run.config.model_dump(mode="json")}
    write_json(run.out / CONFIG_NAME, settings)
    record = open_mlflow_run(
        run.config.tracking,
        run.out,
        params={**run.description, "train": run.config.model_dump()},
        dataset=run.job.dataset,
        dataset_digest=run.description["dataset"]["samples"],
    )
    try:
        yield record
    except BaseException:
        close_mlflow_run(record, ok=False)
        raise


def conclude(
    run: TrainingRun, resumed_from: int | None, mlflow_run: MlflowRun | None
) -> TrainResult:
    """Export the trained model and mark the run finished; in the driver, once no worker is left."""
    latest = latest_complete(run.job.checkpoints)
    assert latest is not None, "a finished loop leaves a checkpoint"
    codec = run.request.codec
    export_model(
        latest, run.spec, None if codec is None else codec_folder(codec), run.out / MODEL_NAME
    )
    run_id = mlflow_run.run_id if mlflow_run else None
    result = run.result(latest, resumed_from, run_id)
    close_mlflow_run(
        mlflow_run,
        ok=True,
        tags={"model_dir": str(result.model_dir), "steps": str(result.steps)},
        artifacts=[run.out / CONFIG_NAME, run.job.history],
    )
    # Last of all, so that a run killed before is concluded again.
    write_json(
        run.out / FINISHED_NAME,
        {"digest": run.digest, "steps": result.steps, "mlflow_run_id": run_id},
    )
    return result


def train_in_process(request: TrainRequest) -> TrainResult:
    """A whole run in this process (strategy `single`); the same as on Ray but for the workers.

    Raises:
        RunError, VideoMismatch, CheckpointMismatch: see `check_run`.
        SkippedTooOften, BatchSamplerError: see `loop.train`.
    """
    strategy = request.config.workers.strategy
    if strategy != "single":
        raise RunError(f"train.workers.strategy is {strategy!r}; one process needs 'single'")
    run = check_run(request)
    earlier = run.finished()
    if earlier is not None:
        return earlier
    with mlflow_record(run) as record:
        ending = train(run.config, run.job, tracking=record)
        return conclude(run, ending.resumed_from, record)
