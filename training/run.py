"""A whole training run as its driver sees it: checked, tracked, trained, exported.

Here the training is done in one process; `on_ray.py` puts workers in its place and shares all the
rest. A run that was finished before is not repeated; one that was killed goes on from its last
complete checkpoint. Knows nothing of Ray.

    FlowreelError, ValueError
    ├── RunError         a dataset, a codec and a model that do not belong together
    └── VideoMismatch    see `stated_video.py`
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.latents.dataset import LatentDataset
from flow.codec import VideoCodec, codec_folder
from flow.codec_factors import WAN_FACTORS, CodecFactors, read_factors
from flow.config import FlowConfig
from flow.flow import FlowModel
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
from training.record.facts import dataset_input, model_version, tracking_of
from training.record.feed import Feed
from training.record.tracking import Tracking
from training.start.frozen import frozen_names, frozen_of
from training.start.lora import adapter_targets, export_adapted
from training.start.source import start_point
from training.state.checkpoint import (
    CODEC_FOLDER,
    Checkpoint,
    check_fits,
    export_model,
    latest_complete,
)
from training.state.run_lock import lock_run
from training.state.stop import stop_signals
from training.stated_video import StatedVideo, video_spec

MODEL_NAME = "model"
ADAPTER_NAME = "adapter"
FINISHED_NAME = "finished.json"
CONFIG_NAME = "train.json"
HistoryProgress = Callable[[list[dict[str, Any]]], None]
"""Takes the lines that are new in a run's history."""
Look = Callable[[Path, Path], Sequence[Path]]
"""Makes what people look at from a model folder, in a folder of its own; returns the files."""
SAMPLES_NAME = "samples"
_log = logging.getLogger(__name__)


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
        name: of the recipe, which the run and its model are called by in MLflow.
    """

    config: TrainConfig
    flow: FlowConfig
    text: TextSpec
    dataset: str | Path
    out: Path
    codec: Path | None = None
    video: StatedVideo = StatedVideo()  # noqa: RUF009 - frozen
    name: str | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind.

    Attributes:
        model_dir: the averaged weights as `flow.model_folder.load_model` reads them, codec inside.
        checkpoint_dir: the last checkpoint.
        steps: steps taken in all.
        resumed_from: step this call went on from; None for a fresh run, `steps` where there was
            nothing to do.
        mlflow_run_id: the run's record; None where tracking is off, or the store never answered.
        history: JSON lines, one per step (`training.record.history.read_history`).
        adapter_dir: the averaged adapters by themselves; None for a run without `train.lora`.
    """

    model_dir: Path
    checkpoint_dir: Path
    steps: int
    resumed_from: int | None
    mlflow_run_id: str | None
    history: Path
    adapter_dir: Path | None = None


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
        return self.result(latest, latest.step)

    def result(self, checkpoint: Checkpoint, resumed_from: int | None) -> TrainResult:
        """The result, given the last checkpoint."""
        tracking = Tracking.read(self.out) if self.config.tracking.enabled else None
        return TrainResult(
            self.out / MODEL_NAME,
            checkpoint.path,
            checkpoint.step,
            resumed_from,
            None if tracking is None else tracking.run_id,
            self.job.history,
            self.out / ADAPTER_NAME if self.config.lora.rank else None,
        )


def check_run(request: TrainRequest) -> TrainingRun:
    """Find what is wrong with a request before a worker is started, or anything written.

    Raises:
        RunError: naming the two things that do not fit, with both values.
        VideoMismatch: the videos that are stated are not those of the dataset.
        FreezeError, LoraError: a pattern matches nothing, or nothing is left to train.
        StartError: what `train.start_from` names does not fit.
        CheckpointMismatch: `out` holds checkpoints of another run.
        BatchSamplerError: batches cannot be drawn from the dataset as the settings say.
    """
    latents = open_latents(request.dataset, "train", request.config.batches.resolution)
    spec = _model_spec(request, latents)
    _check_names(request)
    job = TrainJob(
        request.flow, request.text, latents.folder.location, Path(request.out), _factors(request)
    )
    views = job.sampler(request.config, latents.buckets).views(request.config.steps)
    latest = latest_complete(job.checkpoints)
    if (path := request.config.start_from) is not None:
        has_adapters = request.config.lora.rank > 0
        start = start_point(path, request.flow, request.text, latents, latest, as_base=has_adapters)
        job = dataclasses.replace(job, start=start)
    description = describe(request.config, job, latents)
    if latest is not None:
        if latest.step > request.config.steps:
            raise RunError(
                f"{latest.path} is at step {latest.step}, past train.steps "
                f"{request.config.steps}; raise train.steps, or train into another folder"
            )
        settled = settle_precision(request.config, latest)
        settled_description = {
            **description,
            "train": settled.trajectory(),
            **frozen_of(latest),
        }
        check_fits(latest, settled_description, extend=request.config.extend)
    _texts, line = find_texts(job.text, job.flow, request.config.batches, job.dataset)
    notes = (*uneven(views), *([line] if line else []))
    return TrainingRun(request, job, spec, description, notes)


def _factors(request: TrainRequest) -> CodecFactors:
    return WAN_FACTORS if request.codec is None else read_factors(request.codec)


def _check_names(request: TrainRequest) -> None:
    """Refuse patterns that match nothing of the model."""
    with torch.device("meta"):
        model = FlowModel(request.flow)
    frozen_names((name for name, _ in model.named_parameters()), request.config.freeze)
    if request.config.lora.rank:
        adapter_targets(model, request.config.lora.targets)


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
def mlflow_record(run: TrainingRun) -> Iterator[Feed | None]:
    """What MLflow is fed by while the body trains; closed as failed or killed where it raises.

    A store that does not answer never stops a run. None where tracking is off.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    settings = {**run.description, "all": run.config.model_dump(mode="json")}
    write_json(run.out / CONFIG_NAME, settings)
    if not run.config.tracking.enabled:
        yield None
        return
    tracking = _tracking(run)
    earlier = Tracking.read(run.out)
    # Without a checkpoint, what the folder says may be of another run that was cleared away.
    if earlier is not None and (
        latest_complete(run.job.checkpoints) is not None
        or earlier.tags["trajectory"] == tracking.tags["trajectory"]
    ):
        tracking = tracking.continuing(earlier)
    feed = Feed(run.out, tracking)
    try:
        yield feed
    except BaseException as error:
        feed.close("FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def _tracking(run: TrainingRun) -> Tracking:
    """What MLflow is told of a run before its first step."""
    config, request = run.config, run.request
    location, resolution = run.job.dataset, config.batches.resolution
    train = open_latents(location, "train", resolution)
    inputs = [dataset_input(train, run.description["dataset"]["samples"], "train")]
    if config.evaluation.every_steps:
        held_out = open_latents(location, "held_out", resolution)
        inputs.append(dataset_input(held_out, held_out.ids_digest(), "held_out"))
    return tracking_of(
        config.tracking,
        run.out,
        recipe=request.name,
        flow=request.flow,
        trajectory=digest_of(run.description),
        params={**run.description, "train": config.model_dump()},
        inputs=inputs,
    )


def conclude(
    run: TrainingRun, resumed_from: int | None, feed: Feed | None, look: Look | None = None
) -> TrainResult:
    """Export the trained model and mark the run finished; in the driver, once no worker is left."""
    latest = latest_complete(run.job.checkpoints)
    assert latest is not None, "a finished loop leaves a checkpoint"
    model_dir = run.out / MODEL_NAME
    _export(run, latest, model_dir)
    samples = [] if look is None else _samples(run, look)
    if feed is not None:
        tracking = feed.tracking
        files = [run.out / CONFIG_NAME, run.job.history, *samples]
        feed.close(
            "FINISHED",
            tags={**tracking.tags, "model_dir": str(model_dir), "steps": str(latest.step)},
            artifacts=tuple(os.path.relpath(file, run.out) for file in files),
            model=model_version(tracking, run.job.history, model_dir, latest.step),
        )
    result = run.result(latest, resumed_from)
    # Last of all, so that a run killed before is concluded again.
    write_json(run.out / FINISHED_NAME, {"digest": run.digest, "steps": result.steps})
    return result


def _export(run: TrainingRun, latest: Checkpoint, model_dir: Path) -> None:
    """The model of a run's last checkpoint; of a run with adapters, these by themselves too."""
    codec = run.request.codec
    folder = None if codec is None else codec_folder(codec)
    if not run.config.lora.rank:
        export_model(latest, run.spec, folder, model_dir)
        return
    assert run.job.start is not None, "adapters have a base"
    adapter_dir = run.out / ADAPTER_NAME
    lora, start = run.config.lora, run.job.start
    export_adapted(latest, run.spec, folder, model_dir, adapter_dir, lora, start)


def _samples(run: TrainingRun, look: Look) -> Sequence[Path]:
    try:
        return look(run.out / MODEL_NAME, run.out / SAMPLES_NAME)
    except Exception as error:
        # The model is there and whole; that nobody can look at it yet must not undo it.
        _log.warning("no samples were made of %s: %s", run.out / MODEL_NAME, error)
        return []


def train_in_process(request: TrainRequest, look: Look | None = None) -> TrainResult:
    """A whole run in this process (strategy `single`); the same as on Ray but for the workers.

    Args:
        request: what is to be trained, on what, how, and where to.
        look: called with the exported model; its files become artifacts in MLflow.

    Raises:
        RunError, VideoMismatch, CheckpointMismatch: see `check_run`.
        RunBusy: another process trains into `out`.
        Terminated, KeyboardInterrupt: asked to stop, after a checkpoint was written.
        SkippedTooOften, BatchSamplerError: see `loop.train`.
    """
    strategy = request.config.workers.strategy
    if strategy != "single":
        raise RunError(f"train.workers.strategy is {strategy!r}; one process needs 'single'")
    run = check_run(request)
    earlier = run.finished()
    if earlier is not None:
        return earlier
    with lock_run(run.out), mlflow_record(run) as feed:
        with stop_signals(run.out) as signals:
            ending = train(run.config, run.job, ask=signals.notice)
            if ending.stopped:
                signals.leave()
        return conclude(run, ending.resumed_from, feed, look)
