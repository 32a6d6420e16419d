"""A curriculum is walked as its stages say, and resumed inside any of them as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flow.config import tiny
from flow.model_folder import load_model
from tests.training.world import small_config, small_request, write_dataset
from training.curriculum import CurriculumError, StageTrain, walk
from training.loop import train
from training.record.history import read_history
from training.run import TrainRequest, TrainResult, check_run, train_in_process
from training.stage import Stage, StageConfig, resolved

DEEPER = [1, 1, 1, 3]
STAGES = (
    StageConfig(
        name="images",
        steps=3,
        model={"video": False, "denoiser": False},
        train={"batches": {"image_ratio": 1.0}, "denoiser_loss": False},
    ),
    StageConfig(name="short", steps=4, train={"batches": {"frames": 5}}),
    StageConfig(
        name="long",
        steps=3,
        model={"layers_per_block": DEEPER},
        train={"batches": {"tokens": 192, "multiple_of": 2}},
    ),
)


class Stopped(Exception):
    """The test's own end of a run."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def stages(**changes: Any) -> tuple[Stage, ...]:
    return resolved(STAGES, tiny(), small_config(checkpoints={"every_steps": 2}, **changes))


def in_process(_stage: Stage, request: TrainRequest) -> TrainResult:
    return train_in_process(request)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder)[0].state_dict()


@pytest.fixture(scope="module")
def walked(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    out = tmp_path_factory.mktemp("run")
    return walk(small_request(dataset, out), stages(), in_process)


def test_every_stage_takes_its_steps_and_the_history_says_which(walked: TrainResult) -> None:
    records = read_history(walked.history)
    assert [record["step"] for record in records] == list(range(10))
    assert [record["stage"] for record in records] == ["images"] * 3 + ["short"] * 4 + ["long"] * 3
    assert {r["mode"] for r in records if r["stage"] == "images"} == {"image"}
    assert (walked.steps, walked.resumed_from) == (10, None)


def test_the_runs_model_is_the_last_stages(walked: TrainResult) -> None:
    last = walked.history.parent / "stages" / "03-long" / "model"
    ours, theirs = weights(walked.model_dir), weights(last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_model(walked.model_dir)[0].config.layers_per_block == tuple(DEEPER)


def test_walked_again_it_does_nothing(walked: TrainResult, dataset: Path) -> None:
    again = walk(small_request(dataset, walked.history.parent), stages(), in_process)
    assert (again.steps, again.resumed_from) == (10, 10)


def cut_short(name: str) -> StageTrain:
    """Trains the stages before; of this one two steps and a checkpoint, as a kill leaves it."""

    def train_some(stage: Stage, request: TrainRequest) -> TrainResult:
        if stage.name != name:
            return train_in_process(request)
        run = check_run(request)
        train(run.config.model_copy(update={"steps": 2}), run.job)
        raise Stopped

    return train_some


def test_stopped_inside_any_stage_it_ends_where_an_unbroken_walk_does(
    dataset: Path, tmp_path: Path
) -> None:
    # A cosine of stated length, for a run that is cut short must not know of it.
    request, asked = small_request(dataset, tmp_path / "a"), stages(optimizer={"schedule_steps": 4})
    for name in ("images", "short", "long"):
        with pytest.raises(Stopped):
            walk(request, asked, cut_short(name))
    stopped = walk(request, asked, in_process)
    assert stopped.resumed_from == 9
    unbroken = walk(small_request(dataset, tmp_path / "b"), asked, in_process)
    ours, theirs = weights(stopped.model_dir), weights(unbroken.model_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r["stage"] for r in read_history(stopped.history)] == [
        r["stage"] for r in read_history(unbroken.history)
    ]


def test_a_stage_that_cannot_start_from_the_one_before_stops_nothing_half_way(
    dataset: Path, tmp_path: Path
) -> None:
    narrow = StageConfig(name="narrow", steps=2, model={"layers_per_block": [1, 1, 1, 1]})
    asked = resolved((STAGES[1], narrow), tiny(), small_config())
    with pytest.raises(CurriculumError, match=r"'narrow' cannot start from stage 'short'.*layers"):
        walk(small_request(dataset, tmp_path / "run"), asked, in_process)
    assert not (tmp_path / "run").exists()
