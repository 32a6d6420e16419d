"""What decides the weights is held against the checkpoint: schedule, captions, latents, fps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowreel.values import sha256_of
from tests.training.world import small_config, small_request, write_dataset
from training.record.history import read_history
from training.run import TrainRequest, check_run, train_in_process
from training.state.checkpoint import CheckpointMismatch
from training.state.choice import CheckpointWarning


def seal(data: Path) -> None:
    """Note in the manifest what the files hold, as `prepare` does."""
    path = data / "manifests/00000.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        if (file := data / entry["path"]).is_file():
            entry["sha256"] = sha256_of(file)
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_dataset(tmp_path_factory.mktemp("latents") / "data")
    seal(data)
    return data


@pytest.fixture(scope="module")
def begun(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps that is over, as far as its recipe says."""
    out = tmp_path_factory.mktemp("begun") / "out"
    train_in_process(small_request(dataset, out, small_config(steps=3)))
    return out


@pytest.fixture
def request_of(dataset: Path, begun: Path, tmp_path: Path) -> TrainRequest:
    """The same run in folders of its own, on a dataset that may be changed."""
    shutil.copytree(begun, tmp_path / "out")
    shutil.copytree(dataset, tmp_path / "data")
    return small_request(tmp_path / "data", tmp_path / "out", small_config(steps=3))


def rates(out: Path) -> list[float]:
    return [r["learning_rate"] for r in read_history(out / "history.jsonl")]


def test_more_steps_are_refused_until_it_is_said_what_becomes_of_the_schedule(
    request_of: TrainRequest,
) -> None:
    data, out = Path(request_of.dataset), request_of.out
    with pytest.raises(CheckpointMismatch, match=r"schedule\.steps is 8 but the") as told:
        train_in_process(small_request(data, out, small_config(steps=8)))
    for way in ("schedule_steps to 3 ", "train.extend to true", "train.start_from"):
        assert way in str(told.value)
    held = small_config(steps=4, optimizer={"schedule_steps": 3})
    assert train_in_process(small_request(data, out, held)).steps == 4
    assert rates(out)[3] == 0.0, "the cosine is over"
    longer = small_config(steps=8, extend=True)
    with pytest.warns(CheckpointWarning, match=r"3 steps is extended to 8 .* not 0$"):
        assert train_in_process(small_request(data, out, longer)).steps == 8
    whole = small_request(data, out.with_name("whole"), small_config(steps=8))
    train_in_process(whole)
    assert rates(out)[4:] == rates(whole.out)[4:]
    # What was extended is the run's schedule from then on.
    assert check_run(small_request(data, out, small_config(steps=8))).finished() is not None


def test_another_warm_up_is_no_extension(request_of: TrainRequest) -> None:
    other = small_config(steps=8, extend=True, optimizer={"warmup_steps": 1})
    with pytest.raises(CheckpointMismatch, match=r"warmup_steps is 1 but the checkpoint has 2"):
        check_run(small_request(request_of.dataset, request_of.out, other))


def rewrite(path: Path, column: str) -> None:
    """Change one record's value in a column."""
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0] = values[1]
    place = table.schema.get_field_index(column)
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), path)


@pytest.mark.parametrize(
    ("file", "column", "key"),
    [
        ("latents/00000.9x64x64.parquet", "mean", "latents"),
        ("captions/00000.parquet", "synthetic", "captions"),
    ],
)
def test_changed_data_under_the_same_names_are_refused(
    request_of: TrainRequest, file: str, column: str, key: str
) -> None:
    data = Path(request_of.dataset)
    check_run(request_of)
    rewrite(data / file, column)
    seal(data)
    with pytest.raises(CheckpointMismatch, match=rf"dataset\.{key} is '\w+' but the") as caught:
        check_run(request_of)
    other = {"latents": "captions", "captions": "latents"}[key]
    assert f"dataset.{other}" not in str(caught.value)
    assert "put them back to resume, or train on these into another folder" in str(caught.value)


def test_another_frame_rate_is_refused(request_of: TrainRequest) -> None:
    info = Path(request_of.dataset) / "dataset.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fps": 16.0}))
    with pytest.raises(CheckpointMismatch, match=r"dataset\.fps is 16\.0 but the checkpoint has 8"):
        check_run(request_of)
