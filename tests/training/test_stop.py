"""Signals and notices: the run is saved at the next step, left, and resumed to the same bits."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flow.config import tiny
from flow.flow import FlowModel
from flowreel.errors import Terminated
from pipeline.cli.failures import say_failure
from tests.training import workers
from tests.training.world import TEXT, small_config, small_request, two_workers, write_dataset
from training.data.batches import TrainBatch
from training.loop import TrainJob, train
from training.record.history import read_history
from training.run import train_in_process
from training.state.checkpoint import complete_checkpoints, latest_complete, load_averaged
from training.state.stop import STOP_NAME, Notice, stop_signals
from training.step import StepMetrics, TrainStep


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def averaged(out: Path) -> dict[str, Tensor]:
    checkpoint = latest_complete(out / "checkpoints")
    assert checkpoint is not None
    model = FlowModel(tiny())
    load_averaged(checkpoint, model)
    return model.state_dict()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_at_the_next_step_and_the_run_ends_as_if_it_had_never_come(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    error: type[BaseException],
) -> None:
    take = TrainStep.take

    def take_and_be_told(self: TrainStep, step: int, batch: TrainBatch) -> StepMetrics:
        if step == 3:
            os.kill(os.getpid(), number)
        return take(self, step, batch)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "take", take_and_be_told)
        with pytest.raises(error):
            train_in_process(small_request(dataset, tmp_path / "stopped"))
    assert signal.getsignal(number) is handler
    newest = latest_complete(tmp_path / "stopped/checkpoints")
    assert newest is not None
    assert newest.step == 4, "saved where no checkpoint was due"
    assert not (tmp_path / "stopped/model").exists()
    assert train_in_process(small_request(dataset, tmp_path / "stopped")).resumed_from == 4
    train_in_process(small_request(dataset, tmp_path / "whole"))
    one, two = averaged(tmp_path / "stopped"), averaged(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_the_command_line_ends_a_terminated_run_with_143(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with stop_signals(tmp_path) as signals:
        assert signals.notice() is Notice.NONE
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.notice(), (tmp_path / STOP_NAME).exists()) == (Notice.STOP, True)
        with pytest.raises(Terminated) as caught:
            signals.leave()
    assert say_failure(caught.value, resumes=True) == 143
    said = capsys.readouterr().err
    assert said == "flowreel: terminated, and saved; run the same command again to go on\n"
    assert not (tmp_path / STOP_NAME).exists(), "the next run is not stopped by it"


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with stop_signals(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_notice_of_preemption_saves_once_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    work = TrainJob(tiny(), TEXT, dataset, tmp_path)
    told = iter([Notice.NONE, *[Notice.SAVE] * 5])
    config = small_config(checkpoints={"every_steps": 100, "keep": 9})
    assert not train(config, work, ask=lambda: next(told)).stopped
    assert [c.step for c in complete_checkpoints(work.checkpoints)] == [2, 6]


def test_all_workers_save_alike_when_one_is_told(dataset: Path, tmp_path: Path) -> None:
    work = TrainJob(tiny(), TEXT, dataset, tmp_path)
    config = small_config(
        steps=100_000,
        workers=two_workers(shard_granularity="model"),
        checkpoints={"every_steps": 50_000},
        tracking={"every_steps": 1},
    )
    processes = workers.start(config, work)
    try:
        while not read_history(work.history):
            assert all(p.poll() is None for p in processes), processes[0].communicate()[1]
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        ended = [(p.communicate(timeout=workers.TIMEOUT_S)[1], p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [code for _, code in ended] == [0, 0], ended
    (checkpoint,) = complete_checkpoints(work.checkpoints)
    assert [r["step"] for r in read_history(work.history)] == list(range(checkpoint.step))


def test_another_thread_than_the_main_one_is_told_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with stop_signals(tmp_path) as signals:
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert signals.notice() is Notice.NONE

    handlers: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
