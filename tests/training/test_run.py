"""A run as its driver sees it: exported, recorded, found finished, or refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flow.config import tiny
from flow.flow import FlowModel
from flow.model_folder import VideoSpec, load_model
from flow.text import TextSpec
from tests.training.workers import free_port
from tests.training.world import (
    CODEC,
    TEXT,
    small_config,
    small_request,
    two_workers,
    write_dataset,
)
from training.loop import TrainJob, train
from training.parallel import ParallelError
from training.record.history import History, HistoryTail, read_history
from training.run import RunError, check_run, train_in_process
from training.state.checkpoint import (
    MARKER_NAME,
    CheckpointMismatch,
    latest_complete,
    load_averaged,
)
from training.state.whole import read_marker, write_marker
from training.stated_video import StatedVideo, VideoMismatch

VIDEO = VideoSpec(num_frames=9, height=64, width=64, fps=8.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def test_a_run_leaves_a_model_of_its_averaged_weights(dataset: Path, tmp_path: Path) -> None:
    result = train_in_process(small_request(dataset, tmp_path / "out"))
    assert (result.steps, result.resumed_from, result.mlflow_run_id) == (6, None, None)
    model, spec = load_model(result.model_dir)
    assert (spec.text, spec.video, spec.codec_digest, spec.codec) == (TEXT, VIDEO, CODEC, None)
    assert spec.latents is not None
    assert spec.latents.later_frame_scale == 0.6
    checkpoint = latest_complete(result.checkpoint_dir.parent)
    assert checkpoint is not None
    expected = FlowModel(tiny())
    load_averaged(checkpoint, expected)
    state = expected.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_a_finished_run_is_not_repeated_and_can_be_lengthened(
    dataset: Path, tmp_path: Path
) -> None:
    def go(steps: int) -> tuple[int, int | None, int]:
        config = small_config(steps=steps, optimizer={"schedule_steps": 4})
        r = train_in_process(small_request(dataset, tmp_path, config))
        return r.steps, r.resumed_from, (r.model_dir / "model.safetensors").stat().st_mtime_ns

    first, again, longer = go(4), go(4), go(6)
    assert first[:2] == (4, None)
    assert again == (4, 4, first[2])
    assert longer[:2] == (6, 4)
    assert longer[2] > first[2]
    with pytest.raises(RunError, match=r"at step 6, past train\.steps 4"):
        go(4)


def test_a_run_killed_between_its_last_step_and_its_export_is_exported(
    dataset: Path, tmp_path: Path
) -> None:
    request = small_request(dataset, tmp_path)
    first = train_in_process(request)
    (tmp_path / "finished.json").unlink()
    (first.model_dir / "model.safetensors").unlink()
    again = train_in_process(request)
    assert again.resumed_from == 6
    assert load_model(again.model_dir)[0].config == tiny()


def test_what_does_not_fit_is_said_before_anything_is_written(
    dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"latent_channels is 8, but .* of 4 channels"):
        train_in_process(small_request(dataset, out, flow=tiny(latent_channels=8)))
    with pytest.raises(RunError, match="gives 6 vectors of 32, but the flow reads 6 of 16"):
        train_in_process(small_request(dataset, out, text=TextSpec("hashed", 6, 32)))
    assert not out.exists()
    train_in_process(small_request(dataset, out))
    larger = small_config(batches={"batch_size": 8})
    with pytest.raises(
        CheckpointMismatch, match=r"train\.batches\.batch_size is 8 but the checkpoint has 4"
    ):
        train_in_process(small_request(dataset, out, larger))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": {"count": 2}}, "one process"),
        (
            {"workers": two_workers(count=3)},
            r"batches\.batch_size 4 must be a multiple of workers\.count 3",
        ),
        (
            {"workers": two_workers(min_count=3)},
            r"workers\.min_count is 3, more than workers\.count 2",
        ),
        (
            {"workers": two_workers(count=4, min_count=2)},
            r"batches\.batch_size 4 must be a multiple of a worker count 3",
        ),
        ({"optimizer": {"adam_betas": (0.9, 1.0)}}, r"must lie in \[0, 1\)"),
        ({"optimizer": {"learning_rate": 1.0}}, "Extra inputs are not permitted"),
    ],
)
def test_configurations_that_cannot_work_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        small_config(**changes)


def test_a_model_says_the_size_and_the_rate_of_its_dataset(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", clips=0, images=8, more_buckets={(128, 96): 40})
    out = tmp_path / "out"
    with pytest.raises(
        VideoMismatch, match=r"states height 64, width 64, but .* 9x128x96"
    ) as caught:
        train_in_process(small_request(data, out, video=StatedVideo(height=64, width=64)))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    result = train_in_process(small_request(data, out, small_config(steps=1)))
    assert load_model(result.model_dir)[1].video == VideoSpec(9, 128, 96, 8.0)


def test_another_stated_bucket_is_exported_anew_without_a_step(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", more_buckets={(48, 80): 24})
    out, config = tmp_path / "out", small_config(steps=1)
    first = train_in_process(small_request(data, out, config))
    assert load_model(first.model_dir)[1].video == VIDEO
    request = small_request(data, out, config, video=StatedVideo(height=48, width=80))
    assert check_run(request).finished() is None
    second = train_in_process(request)
    assert (second.steps, second.resumed_from) == (1, 1)
    assert load_model(second.model_dir)[1].video == VideoSpec(9, 48, 80, 8.0)


def test_a_checkpoint_of_an_older_format_is_refused_in_one_line(
    dataset: Path, tmp_path: Path
) -> None:
    request = small_request(dataset, tmp_path)
    result = train_in_process(request)
    marker = result.checkpoint_dir / MARKER_NAME
    write_marker(marker, {**read_marker(marker), "format": 1})
    with pytest.raises(
        CheckpointMismatch, match=r"format 1, this version reads 2 to 3: train"
    ) as caught:
        train_in_process(request)
    assert "\n" not in str(caught.value)


def test_history_drops_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path, 0).append([{"step": i} for i in range(5)])
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in read_history(path)] == [0, 1, 2, 3, 4]
    tail = HistoryTail(path)
    assert len(tail.new_records()) == 5
    resumed = History(path, 3)
    resumed.append([{"step": 3, "again": True}])
    assert [r["step"] for r in read_history(path)] == [0, 1, 2, 3]
    assert tail.new_records() == [{"step": 3, "again": True}]
    resumed.append([{"step": 4}])
    assert [r["step"] for r in tail.new_records()] == [4]


def test_an_elastic_run_goes_on_with_any_of_its_numbers_of_workers(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by one process without FSDP, gone on with as the only one left of at most two."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    whole, halves = (TrainJob(tiny(), TEXT, dataset, tmp_path / n) for n in ("whole", "halves"))
    train(small_config(), whole)
    train(small_config(steps=3, optimizer={"schedule_steps": 6}), halves)
    elastic = two_workers(shard_granularity="model", min_count=1)
    assert train(small_config(workers=elastic), halves).resumed_from == 3
    losses = [[r["loss_nats_per_dim"] for r in read_history(j.history)] for j in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    with pytest.raises(ParallelError, match=r"1 processes were started, .* is 2; start"):
        train(small_config(workers=two_workers()), halves)
