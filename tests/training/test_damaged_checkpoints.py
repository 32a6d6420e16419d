"""Damaged checkpoints are found by digest before they are loaded, and the one before is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flow.config import tiny
from tests.training import workers
from tests.training.world import TEXT, small_config, two_workers, write_dataset
from training.loop import TrainJob, train
from training.record.history import read_history
from training.state.checkpoint import (
    FORMAT_VERSION,
    MARKER_NAME,
    CheckpointMismatch,
    latest_complete,
)
from training.state.choice import CheckpointWarning, DamagedCheckpoints, choose_checkpoint
from training.state.group import HostGroup
from training.state.whole import read_marker, write_marker

ALONE = HostGroup(rank=0, world=1, handle=None)
DATA = "__0_0.distcp"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run with checkpoints after steps 3 and 6."""
    work = TrainJob(tiny(), TEXT, dataset, tmp_path_factory.mktemp("trained"))
    train(small_config(), work)
    return work


@pytest.fixture
def copied(trained: TrainJob, tmp_path: Path) -> TrainJob:
    shutil.copytree(trained.out, tmp_path / "out")
    return TrainJob(trained.flow, trained.text, trained.dataset, tmp_path / "out")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", [DATA, ".metadata", MARKER_NAME])
@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit, remove])
def test_the_one_before_is_used_whatever_happened_to_the_newest(
    copied: TrainJob, name: str, damage: Callable[[Path], None]
) -> None:
    newest = copied.checkpoints / "step_00000006"
    damage(newest / name)
    if (damage, name) == (remove, MARKER_NAME):
        # What a kill during the writing leaves: never a checkpoint, so nothing is damaged.
        choice = choose_checkpoint(copied.checkpoints, ALONE)
        assert not choice.damage
    else:
        with pytest.warns(CheckpointWarning, match=rf"step_00000006 is damaged \({name}"):
            choice = choose_checkpoint(copied.checkpoints, ALONE)
        assert not newest.exists()
        assert (copied.checkpoints / "damaged_00000006").is_dir(), "set aside, not deleted"
        assert len(choice.damage) == 1
    assert choice.checkpoint is not None
    assert choice.checkpoint.step == 3


def test_every_single_bit_of_a_marker_is_held_by_its_digest(copied: TrainJob) -> None:
    """One of its bits turns format 3 into 2, which had no digests."""
    marker = copied.checkpoints / "step_00000006" / MARKER_NAME
    whole = marker.read_bytes()
    start = whole.index(b'"format": 3')
    stop = whole.index(b'"marker_sha256"') + 100
    for place in [*range(start, start + 11), *range(stop - 100, stop)]:
        for bit in (1, 2, 4, 16):
            marker.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            found = latest_complete(copied.checkpoints)
            assert found is not None
            # A space that became another sign of JSON changes nothing that is read.
            assert found.step == 3 or read_marker(marker)


def test_a_run_goes_on_from_the_one_before_and_says_so(copied: TrainJob) -> None:
    flip_a_bit(copied.checkpoints / "step_00000006" / DATA)
    with pytest.warns(CheckpointWarning, match="going on from step_00000003"):
        assert train(small_config(), copied).resumed_from == 3
    history = read_history(copied.history)
    assert [r["step"] for r in history] == list(range(6))
    assert [len(r.get("warnings", [])) for r in history] == [0, 0, 0, 1, 0, 0]
    assert "its SHA-256 is another" in history[3]["warnings"][0]


def test_a_run_without_a_whole_checkpoint_is_refused_and_stays_as_it_is(copied: TrainJob) -> None:
    for step in ("step_00000003", "step_00000006"):
        cut(copied.checkpoints / step / DATA)
    for _ in range(2):
        with pytest.raises(DamagedCheckpoints, match="to begin anew here, remove") as caught:
            train(small_config(), copied)
        assert "\n" not in str(caught.value)
        assert "step_00000003: __0_0.distcp has" in str(caught.value)
    assert len(list(copied.checkpoints.iterdir())) == 2


def test_a_run_whose_only_checkpoint_was_set_aside_does_not_begin_anew(copied: TrainJob) -> None:
    cut(copied.checkpoints / "step_00000006" / DATA)
    with pytest.warns(CheckpointWarning):
        choose_checkpoint(copied.checkpoints, ALONE)
    shutil.rmtree(copied.checkpoints / "step_00000003")
    with pytest.raises(DamagedCheckpoints, match="damaged_00000006: set aside before"):
        choose_checkpoint(copied.checkpoints, ALONE)


@pytest.mark.slow
def test_all_workers_follow_when_one_finds_damage(copied: TrainJob) -> None:
    # Files are shared out by name: the marker is worker 0's, the data are worker 1's to look at.
    flip_a_bit(copied.checkpoints / "step_00000006" / DATA)
    workers.run(small_config(workers=two_workers(shard_granularity="model")), copied)
    history = read_history(copied.history)
    assert [r["step"] for r in history] == list(range(6))
    assert "warnings" in history[3]


def test_a_newer_format_is_refused_by_number_and_names_who_reads_it(copied: TrainJob) -> None:
    marker = copied.checkpoints / "step_00000006" / MARKER_NAME
    newer = {**read_marker(marker), "format": FORMAT_VERSION + 1, "flowreel": "9.8.7"}
    write_marker(marker, newer)
    with pytest.raises(
        CheckpointMismatch, match=rf"format {FORMAT_VERSION + 1}, .* go on with Flowreel 9\.8\.7"
    ):
        train(small_config(), copied)


def test_a_checkpoint_from_before_the_digests_is_resumed(copied: TrainJob) -> None:
    marker = copied.checkpoints / "step_00000006" / MARKER_NAME
    older = {k: v for k, v in read_marker(marker).items() if k not in ("files", "flowreel")}
    del older["description"]["schedule"]
    for key in ("fps", "latents", "captions"):
        del older["description"]["dataset"][key]
    write_marker(marker, {**older, "format": 2})
    text = marker.read_text()
    marker.write_text(text[: text.index('"marker_sha256"')] + text[text.index('"step"') :])
    assert train(small_config(steps=8), copied).resumed_from == 6
