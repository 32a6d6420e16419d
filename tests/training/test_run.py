"""A run as its driver sees it: exported, recorded, found finished, and refused before it starts
when it cannot work.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flow.flow import FlowModel
from flow.model_folder import VideoSpec, load_model
from flow.text import TextSpec
from tests.training.world import CODEC, TEXT, small_config, small_flow, write_dataset
from training.checkpoint import CheckpointMismatch, latest_complete, load_averaged
from training.history import History, HistoryTail, read_history
from training.run import RunError, train_in_process
from training.tracking import TRACKING_NAME

VIDEO = VideoSpec(num_frames=9, height=64, width=64, fps=8.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def test_a_run_leaves_a_model_of_its_averaged_weights(dataset: Path, tmp_path: Path) -> None:
    result = train_in_process(
        small_config(), small_flow(), TEXT, VIDEO, dataset, None, tmp_path / "out"
    )
    assert (result.steps, result.resumed_from, result.mlflow_run_id) == (6, None, None)
    model, spec = load_model(result.model_dir)
    assert (spec.text, spec.video, spec.codec_digest, spec.codec) == (TEXT, VIDEO, CODEC, None)
    assert spec.latents is not None
    assert spec.latents.later_frame_scale == 0.6
    checkpoint = latest_complete(result.checkpoint_dir.parent)
    assert checkpoint is not None
    expected = FlowModel(small_flow())
    load_averaged(checkpoint, expected)
    state = expected.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_a_finished_run_is_not_repeated_and_can_be_lengthened(
    dataset: Path, tmp_path: Path
) -> None:
    def go(steps: int) -> tuple[int, int | None, int]:
        r = train_in_process(
            small_config(steps=steps), small_flow(), TEXT, VIDEO, dataset, None, tmp_path
        )
        return r.steps, r.resumed_from, (r.model_dir / "model.safetensors").stat().st_mtime_ns

    first, again, longer = go(4), go(4), go(6)
    assert first[:2] == (4, None)
    assert again == (4, 4, first[2])
    assert longer[:2] == (6, 4)
    assert longer[2] > first[2]
    with pytest.raises(RunError, match="at step 6, past steps 4"):
        go(4)


def test_a_run_killed_between_its_last_step_and_its_export_is_exported(
    dataset: Path, tmp_path: Path
) -> None:
    arguments = (small_config(), small_flow(), TEXT, VIDEO, dataset, None, tmp_path)
    first = train_in_process(*arguments)
    (tmp_path / "finished.json").unlink()
    (first.model_dir / "model.safetensors").unlink()
    again = train_in_process(*arguments)
    assert again.resumed_from == 6
    assert load_model(again.model_dir)[0].config == small_flow()


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(dataset: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    def go(steps: int) -> str:
        config = small_config(steps=steps, schedule_steps=6, tracking=True)
        result = train_in_process(config, small_flow(), TEXT, VIDEO, dataset, None, tmp_path)
        assert result.mlflow_run_id is not None
        return result.mlflow_run_id

    run_id = go(3)
    assert go(6) == run_id
    saved = json.loads((tmp_path / TRACKING_NAME).read_text())
    assert saved["run_id"] == run_id
    client = MlflowClient(saved["uri"])
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["flow.deep_width"] == "32"
    logged = client.get_metric_history(run_id, "loss_nats_per_dim")
    assert [m.step for m in logged] == list(range(6))
    history = read_history(tmp_path / "history.jsonl")
    assert [m.value for m in logged] == [r["loss_nats_per_dim"] for r in history]


def test_what_does_not_fit_is_said_before_anything_is_written(
    dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"latent_channels is 8, but .* of 4 channels"):
        train_in_process(
            small_config(), small_flow(latent_channels=8), TEXT, None, dataset, None, out
        )
    with pytest.raises(RunError, match="gives 6 vectors of 32, but the flow reads 6 of 16"):
        train_in_process(
            small_config(), small_flow(), TextSpec("hashed", 6, 32), None, dataset, None, out
        )
    assert not out.exists()
    train_in_process(small_config(), small_flow(), TEXT, None, dataset, None, out)
    with pytest.raises(CheckpointMismatch, match="batch_size is 8 but the checkpoint has 4"):
        train_in_process(small_config(batch_size=8), small_flow(), TEXT, None, dataset, None, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 2}, "one process"),
        ({"workers": 3, "strategy": "fsdp"}, "batch_size 4 must be a multiple of workers 3"),
        ({"adam_betas": (0.9, 1.0)}, r"must lie in \[0, 1\)"),
        ({"learning_rate": 1.0}, "Extra inputs are not permitted"),
    ],
)
def test_configurations_that_cannot_work_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        small_config(**changes)


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
