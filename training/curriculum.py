"""Walks the stages of a curriculum: each a whole run, from the weights of the one before.

    out/stages/01-images/     a run as any other: checkpoints, history, its model
    out/stages/02-video/      the next one, started from that model, grown where it is larger
    out/model/                the last stage's model
    out/history.jsonl         the steps of all finished stages, counted on, each with its stage

A stage that was finished before is not repeated, and one that was killed goes on from its last
checkpoint: so does the walk, called again. Knows what a run is. Knows nothing of Ray.

    FlowreelError, ValueError
    └── CurriculumError    a stage that the model of the one before cannot grow into
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from flow.growth import growth_problems
from flow.model_folder import read_spec, write_model
from flow.tensor_files import TensorFolder
from flowreel.errors import FlowreelError
from flowreel.files import write_whole
from training.record.history import HISTORY_NAME, read_history
from training.run import MODEL_NAME, TrainRequest, TrainResult
from training.stage import Stage
from training.state.checkpoint import CODEC_FOLDER

STAGES_NAME = "stages"
StageTrain = Callable[[Stage, TrainRequest], TrainResult]
"""Trains one stage: on Ray, or in this process."""


class CurriculumError(FlowreelError, ValueError):
    """A stage that the model of the one before cannot grow into."""


def stage_folder(out: Path, number: int, stage: Stage) -> Path:
    """Where a stage of a run lies; numbered from 1, so that a listing has their order.

    >>> from flow.config import tiny
    >>> from training.config import TrainConfig
    >>> stage_folder(Path("run"), 1, Stage("images", tiny(), TrainConfig())).as_posix()
    'run/stages/01-images'
    """
    return out / STAGES_NAME / f"{number:02d}-{stage.name}"


def stage_in_work(out: Path) -> Path:
    """The folder of the newest stage of a run that walks some; of any other run its own."""
    folders = sorted(path for path in (out / STAGES_NAME).glob("*") if path.is_dir())
    return folders[-1] if folders else out


def stage_requests(request: TrainRequest, stages: Sequence[Stage]) -> Iterator[TrainRequest]:
    """What each stage asks of training; all but the first start from the model before them."""
    before: Path | None = None
    for number, stage in enumerate(stages, 1):
        config = stage.train
        if before is not None:
            config = config.model_copy(update={"start_from": str(before.resolve() / MODEL_NAME)})
        folder = stage_folder(request.out, number, stage)
        name = None if request.name is None else f"{request.name}/{stage.name}"
        yield dataclasses.replace(request, config=config, flow=stage.flow, out=folder, name=name)
        before = folder


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse a curriculum that would stop on its way.

    Raises:
        CurriculumError: naming both stages and every setting that keeps one from the other.
    """
    for before, after in pairwise(stages):
        if problems := growth_problems(before.flow, after.flow):
            raise CurriculumError(
                f"stage {after.name!r} cannot start from stage {before.name!r}: "
                f"{'; '.join(problems)}. Change `model` of one of them"
            )


def walk(request: TrainRequest, stages: Sequence[Stage], train: StageTrain) -> TrainResult:
    """Train all stages in order; the last one's result, as the run's.

    Args:
        request: the run's; each stage has settings, shape and folder of its own.
        train: trains one of them, or finds it finished.

    Raises:
        CurriculumError: before anything is trained.
    """
    check_stages(stages)
    results: list[TrainResult] = []
    for stage, asked in zip(stages, stage_requests(request, stages), strict=True):
        results.append(train(stage, asked))
        _write_history(request.out, stages, results)
    last = results[-1]
    model = request.out / MODEL_NAME
    _take_over(last.model_dir, model)
    worked = [r.steps - (r.resumed_from or 0) for r in results]
    steps = sum(r.steps for r in results)
    # None where all of it was trained now; else the steps that stood before.
    resumed_from = None if sum(worked) == steps else steps - sum(worked)
    return dataclasses.replace(
        last,
        model_dir=model,
        steps=steps,
        resumed_from=resumed_from,
        history=request.out / HISTORY_NAME,
    )


def _write_history(out: Path, stages: Sequence[Stage], results: Sequence[TrainResult]) -> None:
    """One history of all that is trained so far, steps counted on, each with its stage's name."""
    lines: list[dict[str, Any]] = []
    for stage, result in zip(stages, results, strict=False):
        first = len(lines)
        lines += [
            {**record, "step": first + int(record["step"]), "stage": stage.name}
            for record in read_history(result.history)
        ]
    write_whole(out / HISTORY_NAME, "".join(json.dumps(line) + "\n" for line in lines))


def _take_over(model: Path, out: Path) -> None:
    """The last stage's model as the run's, a tensor at a time; whole or not at all."""
    codec = model / CODEC_FOLDER
    extra = {CODEC_FOLDER: codec} if codec.is_dir() else None
    write_model(out, _Tensors(TensorFolder.open(model)), read_spec(model), extra=extra)


class _Tensors(Mapping[str, Tensor]):
    """A folder's tensors by name, each read when it is asked for."""

    def __init__(self, files: TensorFolder) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._files.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.shapes)

    def __len__(self) -> int:
        return len(self._files.shapes)
