"""One run per folder: a second is refused, a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.training.world import small_request, write_dataset
from training.run import train_in_process
from training.state.group import HostGroup
from training.state.run_lock import RunBusy, lock_run, lock_writing

HOLDER = (
    "import sys, time\nfrom pathlib import Path\nfrom training.state.run_lock import lock_run\n"
    "with lock_run(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


def test_a_second_run_is_refused_in_one_line_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy) as caught:
            train_in_process(small_request(dataset, out))
        said = str(caught.value)
        assert "\n" not in said
        assert f"trained by process {holder.pid} on {socket.gethostname()} since 2" in said
        assert [path.name for path in out.iterdir()] == [".lock"], "nothing was written"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert train_in_process(small_request(dataset, out)).steps == 6


def test_a_lock_is_free_again_after_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_run(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_workers_that_outlive_their_driver_are_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.state.run_lock._DYING_S", 0.2)
    alone = HostGroup(rank=0, world=1, handle=None)
    with lock_writing(tmp_path, alone):
        with (
            pytest.raises(RunBusy, match=f"by process {os.getpid()}"),
            lock_writing(tmp_path, alone),
        ):
            raise AssertionError("held twice")
        with lock_run(tmp_path):  # the driver's lock is another
            pass
