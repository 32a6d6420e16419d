"""Whole runs of real processes: many equal one, resumed equals uninterrupted, what stops a run."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.latents.dataset import LatentDataset
from flow.config import tiny
from flow.flow import FlowModel
from tests.training import workers
from tests.training.world import TEXT, small_config, two_workers, write_dataset
from training.config import TrainConfig
from training.data.batch_sampler import BatchSampler
from training.loop import TrainJob, settle_precision, train
from training.record.history import read_history
from training.state.checkpoint import (
    MARKER_NAME,
    CheckpointMismatch,
    complete_checkpoints,
    latest_complete,
    load_averaged,
)
from training.state.whole import read_marker, write_marker
from training.step import SkippedTooOften, StepWarning


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def job(dataset: Path, out: Path, **changes: Any) -> TrainJob:
    return TrainJob(tiny(**changes), TEXT, dataset, out)


def averaged(work: TrainJob) -> dict[str, Tensor]:
    """Averaged weights of the newest checkpoint."""
    checkpoint = latest_complete(work.checkpoints)
    assert checkpoint is not None
    model = FlowModel(work.flow)
    load_averaged(checkpoint, model)
    return model.state_dict()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def many(**changes: Any) -> TrainConfig:
    granularity = changes.pop("shard_granularity", "layer")
    return small_config(workers=two_workers(shard_granularity=granularity), **changes)


@pytest.fixture(scope="module")
def single(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """An uninterrupted run of one process."""
    work = job(dataset, tmp_path_factory.mktemp("single"))
    train(small_config(), work)
    return work


@pytest.mark.parametrize(
    "granularity", ["layer", "model", pytest.param("block", marks=pytest.mark.slow)]
)
def test_two_workers_end_where_one_does(
    granularity: str, single: TrainJob, dataset: Path, tmp_path: Path
) -> None:
    work = job(dataset, tmp_path)
    workers.run(many(shard_granularity=granularity), work)
    assert largest_difference(averaged(work), averaged(single)) < 1e-5
    one, two = read_history(single.history), read_history(work.history)
    assert [r["step"] for r in two] == list(range(6))
    for a, b in zip(one, two, strict=True):
        assert b["loss_nats_per_dim"] == pytest.approx(a["loss_nats_per_dim"], abs=1e-5)
        assert b["flow_grad_norm"] == pytest.approx(a["flow_grad_norm"], rel=1e-4)
        assert b["denoiser_loss"] == pytest.approx(a["denoiser_loss"], rel=1e-4)


def test_two_workers_end_where_one_does_by_muon_too_and_resume_exactly(
    dataset: Path, tmp_path: Path
) -> None:
    by_muon = {"kind": "muon", "schedule_steps": 6}
    one, two, halves = (job(dataset, tmp_path / name) for name in ("one", "two", "halves"))
    train(small_config(optimizer=by_muon), one)
    workers.run(many(optimizer=by_muon), two)
    assert largest_difference(averaged(one), averaged(two)) < 1e-5
    train(small_config(optimizer=by_muon, steps=3), halves)
    train(small_config(optimizer=by_muon), halves)
    assert largest_difference(averaged(one), averaged(halves)) == 0


def test_a_resumed_run_ends_exactly_where_an_uninterrupted_one_does(
    single: TrainJob, dataset: Path, tmp_path: Path
) -> None:
    work = job(dataset, tmp_path)
    first = train(small_config(steps=3, optimizer={"schedule_steps": 6}), work)
    assert first.resumed_from is None
    whole = job(dataset, tmp_path / "whole")
    train(small_config(optimizer={"schedule_steps": 6}), whole)
    second = train(small_config(optimizer={"schedule_steps": 6}), work)
    assert second.resumed_from == 3
    assert largest_difference(averaged(work), averaged(whole)) == 0.0
    assert [r["step"] for r in read_history(work.history)] == list(range(6))


def test_one_worker_goes_on_from_the_checkpoint_of_two(
    single: TrainJob, dataset: Path, tmp_path: Path
) -> None:
    work = job(dataset, tmp_path)
    workers.run(many(steps=3, optimizer={"schedule_steps": 6}), work)
    train(small_config(optimizer={"schedule_steps": 6}), work)
    assert largest_difference(averaged(work), averaged(single)) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_workers_resume_from_the_last_complete_checkpoint(
    dataset: Path, tmp_path: Path
) -> None:
    config = many(steps=24, checkpoints={"every_steps": 4, "keep": 3}, tracking={"every_steps": 1})
    work = job(dataset, tmp_path / "killed")
    processes = workers.start(config, work)
    while len(complete_checkpoints(work.checkpoints)) < 2:
        assert all(p.poll() is None for p in processes), processes[0].communicate()[1]
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    interrupted = latest_complete(work.checkpoints)
    assert interrupted is not None
    assert interrupted.step < 24
    workers.run(config, work)
    whole = job(dataset, tmp_path / "whole")
    workers.run(config, whole)
    assert largest_difference(averaged(work), averaged(whole)) <= 1e-6
    losses = [[r["loss_nats_per_dim"] for r in read_history(w.history)] for w in (work, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(losses[0]) == 24


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_in_the_precision_that_it_began_with_wherever_it_is_resumed(
    precision: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is settled by the machine once, and then by the checkpoint."""

    def quick(answer: bool) -> None:
        monkeypatch.setattr("training.loop.has_quick_bf16", lambda device: answer)

    quick(precision == "bf16")
    whole, halves = job(dataset, tmp_path / "whole"), job(dataset, tmp_path / "halves")
    train(small_config(precision=precision, optimizer={"schedule_steps": 6}), whole)
    train(small_config(precision="auto", steps=3, optimizer={"schedule_steps": 6}), halves)
    quick(precision != "bf16")
    six = small_config(precision="auto", optimizer={"schedule_steps": 6})
    assert train(six, halves).resumed_from == 3
    assert largest_difference(averaged(whole), averaged(halves)) == 0


def test_auto_waits_for_workers_to_be_asked() -> None:
    assert settle_precision(TrainConfig(precision="auto"), None).precision == "auto"


def test_a_checkpoint_without_its_marker_is_not_one(dataset: Path, tmp_path: Path) -> None:
    work = job(dataset, tmp_path)
    train(small_config(), work)
    newest = latest_complete(work.checkpoints)
    assert newest is not None
    assert newest.step == 6
    (newest.path / MARKER_NAME).unlink()
    older = latest_complete(work.checkpoints)
    assert older is not None
    assert older.step == 3
    assert train(small_config(), work).resumed_from == 3
    assert [r["step"] for r in read_history(work.history)] == list(range(6))


def test_only_the_newest_checkpoints_are_kept(dataset: Path, tmp_path: Path) -> None:
    work = job(dataset, tmp_path)
    train(small_config(checkpoints={"every_steps": 1, "keep": 2}), work)
    assert [c.step for c in complete_checkpoints(work.checkpoints)] == [5, 6]
    assert len(list(work.checkpoints.iterdir())) == 2


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(
    single: TrainJob, dataset: Path
) -> None:
    other = job(dataset, single.out, deep_width=64)
    with pytest.raises(
        CheckpointMismatch, match=r"flow.deep_width is 64 but the checkpoint has 32"
    ):
        train(small_config(), other)
    with pytest.raises(CheckpointMismatch, match=r"train.seed is 5 but the checkpoint has 0"):
        train(small_config(seed=5), single)


def test_a_setting_that_came_after_a_checkpoint_has_its_default_there(
    single: TrainJob, tmp_path: Path
) -> None:
    folder = tmp_path / "earlier"
    shutil.copytree(single.out, folder)
    earlier = TrainJob(single.flow, single.text, single.dataset, folder)
    latest = latest_complete(earlier.checkpoints)
    assert latest is not None
    marker = latest.path / MARKER_NAME
    written = read_marker(marker)
    del written["description"]["train"]["optimizer"]["kind"]
    write_marker(marker, written)
    longer = {"schedule_steps": 6}
    assert train(small_config(steps=8, optimizer=longer), earlier).resumed_from == 6
    with pytest.raises(CheckpointMismatch, match=r"optimizer\.kind is 'muon'"):
        train(small_config(optimizer={"kind": "muon", **longer}), earlier)


def test_broken_latents_are_skipped_and_then_stop_the_run_with_the_reason(tmp_path: Path) -> None:
    broken = write_dataset(tmp_path / "data", broken=float("inf"))
    work = job(broken, tmp_path / "out")
    before = FlowModel(work.flow)
    config = small_config(optimizer={"max_consecutive_skips": 4}, steps=20)
    with (
        pytest.warns(StepWarning, match=r"step 0 was skipped: loss None, .* samples: 00000/clip"),
        pytest.raises(SkippedTooOften, match="4 steps in a row were skipped up to step 3"),
    ):
        train(config, work)
    checkpoint = latest_complete(work.checkpoints)
    assert checkpoint is not None
    load_averaged(checkpoint, before)
    assert all(torch.isfinite(p).all() for p in before.parameters())
    history = read_history(work.history)
    assert all(r["skipped"] == 1 for r in history)
    assert [len(r.get("warnings", [])) for r in history] == [1, 0, 0, 0], "said once in a row"
    sampler = BatchSampler(LatentDataset(broken).buckets, config.batches, config.seed)
    assert [r["skipped_samples"] for r in history] == [
        list(sampler.plan(step).ids) for step in range(4)
    ]


def test_all_workers_skip_when_one_of_them_sees_a_broken_sample(tmp_path: Path) -> None:
    broken = write_dataset(tmp_path / "data", broken=float("nan"))
    work = job(broken, tmp_path / "out")
    workers.run(many(steps=2, optimizer={"max_consecutive_skips": 5}), work)
    state = averaged(work)
    assert all(torch.isfinite(t).all() for t in state.values())


def test_held_out_loss_is_the_same_on_two_workers_in_every_bucket(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", more_buckets={(48, 80): 40})
    losses: list[list[dict[str, float]]] = []
    for name, config in (
        ("one", small_config(evaluation={"every_steps": 3, "clips": 3})),
        ("two", many(evaluation={"every_steps": 3, "clips": 3})),
    ):
        work = job(dataset, tmp_path / name)
        if config.workers.count == 1:
            train(config, work)
        else:
            workers.run(config, work)
        history = read_history(work.history)
        losses.append([{k: v for k, v in r.items() if "held_out" in k} for r in history])
    assert not losses[0][0]
    buckets = ("1x64x64", "9x48x80", "9x64x64")
    for one, two in ((losses[0][step], losses[1][step]) for step in (2, 5)):
        means = {"held_out_nats_per_dim", "held_out_raw_nats_per_dim"}
        assert one.keys() == means | {f"held_out/{b}" for b in buckets}
        assert one == pytest.approx(two, abs=1e-5)
        assert one["held_out_nats_per_dim"] == one["held_out/9x64x64"]


def test_a_report_says_times_and_memory(single: TrainJob) -> None:
    history = read_history(single.history)
    # A report each two steps and with each checkpoint, here of three; its newest line has it.
    memory = {record["step"]: record["rss_bytes"] for record in history if "rss_bytes" in record}
    assert memory.keys() == {1, 2, 3, 5}
    assert all(value > 1 << 20 for value in memory.values())
    assert all(0 <= record["data_wait_s"] <= record["step_s"] for record in history)
    times = [record["time_s"] for record in history]
    assert times == sorted(times)


def test_evaluating_does_not_change_what_is_learnt(
    single: TrainJob, dataset: Path, tmp_path: Path
) -> None:
    work = job(dataset, tmp_path)
    train(small_config(evaluation={"every_steps": 1, "clips": 2}), work)
    assert largest_difference(averaged(work), averaged(single)) == 0.0


def test_prefetched_batches_are_the_same(single: TrainJob, dataset: Path, tmp_path: Path) -> None:
    work = job(dataset, tmp_path)
    train(small_config(batches={"prefetch": True}), work)
    assert largest_difference(averaged(work), averaged(single)) == 0.0
