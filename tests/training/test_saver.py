"""Checkpoints in a thread: same bits, no waiting, order kept; full disks; which ones stay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from flow.config import tiny
from tests.training import full_disk_workers, workers
from tests.training.full_disk_workers import small_files
from tests.training.world import TEXT, small_config, two_workers, write_dataset
from training.data.batches import TrainBatch
from training.loop import TrainJob, train
from training.parallel import Parallel
from training.record.history import History, read_history
from training.sections import CheckpointConfig
from training.state import saver as savers
from training.state.checkpoint import (
    Checkpoint,
    complete_checkpoints,
    load_checkpoint,
    write_checkpoint,
)
from training.state.choice import CheckpointWarning
from training.state.group import HostGroup
from training.state.saver import CheckpointFailed, Saver, want_of_room
from training.step import StepMetrics, TrainStep

ALONE = HostGroup(rank=0, world=1, handle=None)
HERE = Parallel(rank=0, world=1, device=torch.device("cpu"), mesh=None)
LONG_S = 120.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def job(dataset: Path, out: Path) -> TrainJob:
    return TrainJob(tiny(), TEXT, dataset, out)


def before_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], None]]) -> None:
    """Do something right before these steps are taken."""
    take = TrainStep.take

    def act_and_take(self: TrainStep, step: int, batch: TrainBatch) -> StepMetrics:
        actions.get(step, lambda: None)()
        return take(self, step, batch)

    monkeypatch.setattr(TrainStep, "take", act_and_take)


def test_what_is_written_is_the_state_as_it_was_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "matrix": torch.randn(7, 5, generator=generator),
        "view": torch.randn(4, 6, generator=generator)[:, 1:3],
        "half": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    plain = write_checkpoint(tmp_path / "plain", 1, before, {}, ALONE)
    go_on = threading.Event()

    def write_later(*arguments: Any) -> Checkpoint:
        assert go_on.wait(LONG_S)
        return write_checkpoint(*arguments)

    monkeypatch.setattr(savers, "write_checkpoint", write_later)
    saver = Saver(tmp_path / "later", {}, CheckpointConfig(), HERE)
    saver.stage(1, state)
    saver.begin()
    for tensor in state.values():
        tensor.add_(1)
    go_on.set()
    saver.finish()
    saver.close()
    assert saver.last is not None
    assert saver.last.files["__0_0.distcp"] == plain.files["__0_0.distcp"]
    load_checkpoint(saver.last, state, HERE)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_training_goes_on_while_a_checkpoint_is_written_and_the_history_comes_first(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is held back until two more steps were begun."""
    work = job(dataset, tmp_path)
    go_on, at_once, most = threading.Event(), 0, 0

    def write_late(root: Path, step: int, *arguments: Any) -> Checkpoint:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        assert go_on.wait(LONG_S), "training waited for the checkpoint"
        assert len(read_history(work.history)) >= step, "the marker came before the history"
        checkpoint = write_checkpoint(root, step, *arguments)
        at_once -= 1
        return checkpoint

    monkeypatch.setattr(savers, "write_checkpoint", write_late)
    before_step(monkeypatch, {3: go_on.set})
    train(small_config(checkpoints={"every_steps": 2, "keep": 9}), work)
    assert [c.step for c in complete_checkpoints(work.checkpoints)] == [2, 4, 6]
    assert most == 1, "one at a time"
    stalls = [r.get("checkpoint_stall_s") for r in read_history(work.history)]
    assert [stall is not None for stall in stalls] == [False, True] * 3


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk has no room for the checkpoints after these steps."""

    def write(root: Path, step: int, *arguments: Any) -> Checkpoint:
        with small_files(16_384) if step in steps else nullcontext():
            return write_checkpoint(root, step, *arguments)

    monkeypatch.setattr(savers, "write_checkpoint", write)


def test_training_goes_on_through_a_full_disk_and_the_next_checkpoint_is_tried(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, whole = job(dataset, tmp_path / "full"), job(dataset, tmp_path / "whole")
    train(small_config(), whole)
    full_at(monkeypatch, 2, 3)
    with pytest.warns(CheckpointWarning, match=r"could not be written .* tries again"):
        train(small_config(checkpoints={"every_steps": 1, "keep": 9}), work)
    steps = [c.step for c in complete_checkpoints(work.checkpoints)]
    assert steps == [1, 4, 5, 6]
    assert sorted(p.name for p in work.checkpoints.iterdir()) == [f"step_{s:08d}" for s in steps]
    history = read_history(work.history)
    assert [r["step"] for r in history] == list(range(6))
    assert [len(r.get("warnings", [])) for r in history] == [0, 0, 0, 1, 1, 0]
    assert "File too large" in history[3]["warnings"][0]
    one, two = (complete_checkpoints(w.checkpoints)[-1] for w in (work, whole))
    assert one.files["__0_0.distcp"] == two.files["__0_0.distcp"]


@pytest.mark.slow
def test_all_workers_go_on_when_one_finds_the_disk_full(dataset: Path, tmp_path: Path) -> None:
    work = job(dataset, tmp_path)
    config = small_config(
        workers=two_workers(shard_granularity="model"),
        checkpoints={"every_steps": 2, "keep": 9},
    )
    workers.run(config, work, full_disk_workers.__name__)
    steps = [c.step for c in complete_checkpoints(work.checkpoints)]
    assert steps == [4, 6]
    assert sorted(p.name for p in work.checkpoints.iterdir()) == [f"step_{s:08d}" for s in steps]
    noted = [r for r in read_history(work.history) if "warnings" in r]
    assert len(noted) == 1
    assert "File too large" in noted[0]["warnings"][0]


def test_a_last_checkpoint_that_finds_no_room_is_an_error_and_takes_nothing_away(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(dataset, tmp_path)
    with monkeypatch.context() as patch:
        full_at(patch, 6)
        with pytest.raises(CheckpointFailed, match="it goes on from step 3") as caught:
            train(small_config(), work)
    assert "\n" not in str(caught.value)
    assert [p.name for p in work.checkpoints.iterdir()] == ["step_00000003"]
    assert train(small_config(), work).resumed_from == 3


def test_lines_of_the_history_that_found_no_room_are_written_later(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl", 0)
    lines = [{"step": step, "text": "x" * 40} for step in range(4)]
    history.append(lines[:1])
    with small_files(100):
        for line in lines[1:3]:
            with pytest.raises(OSError, match="too large"):
                history.append([line], durable=True)
    assert read_history(history.path) == lines[:1], "the half line counts for nothing"
    history.append(lines[3:])
    assert read_history(history.path) == lines


def test_too_little_room_is_said_at_the_start_with_numbers(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"a": torch.zeros(500_000), "b": torch.zeros(1_000_000, dtype=torch.bfloat16)}
    config = CheckpointConfig(keep=3, keep_best=1)

    def room(free: int) -> str | None:
        usage = savers.shutil._ntuple_diskusage(10**12, 0, free)
        monkeypatch.setattr(savers.shutil, "disk_usage", lambda _: usage)
        return want_of_room(tmp_path, state, config, ALONE)

    assert room(20_000_000) is None
    said = room(19_999_999)
    assert said is not None
    assert "5 checkpoints of 0.004 GB (4 kept and one being written) need 0.02 GB" in said
    (tmp_path / "step_1").write_bytes(b"\0" * 1000)  # what is there will be replaced
    assert room(19_999_000) is None
    room(0)
    with pytest.warns(CheckpointWarning, match=r"3 checkpoints of .* free some space"):
        train(small_config(steps=1), job(dataset, tmp_path / "out"))


def test_the_newest_and_the_best_on_held_out_clips_stay(dataset: Path, tmp_path: Path) -> None:
    work = job(dataset, tmp_path)
    config = small_config(
        checkpoints={"every_steps": 1, "keep": 1, "keep_best": 2},
        evaluation={"every_steps": 1, "clips": 2},
        optimizer={"flow_learning_rate": 0.3, "ema_decay": 0.0},
    )
    train(config, work)
    history = read_history(work.history)
    nats = {r["step"] + 1: r["held_out_nats_per_dim"] for r in history}
    best = sorted(nats, key=lambda step: nats[step])[:2]
    kept = complete_checkpoints(work.checkpoints)
    assert {c.step for c in kept} == {6, *best}
    assert {c.step: c.held_out for c in kept} == {step: nats[step] for step in {6, *best}}
    # Averages that forget at once are the weights, so that both are measured alike.
    assert all(r["held_out_raw_nats_per_dim"] == r["held_out_nats_per_dim"] for r in history)


def test_the_best_cannot_be_kept_where_checkpoints_are_not_measured() -> None:
    with pytest.raises(ValueError, match=r"keep_best is 1, but checkpoints come every 3 steps"):
        small_config(checkpoints={"keep_best": 1})
