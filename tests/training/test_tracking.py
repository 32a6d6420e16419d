"""MLflow has every step of a run once, whatever happened to its server; training never minds."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.world import small_config, small_request, write_dataset
from training.record.feed import Feed, Sender, TrackingError, add_to_record, send_folder
from training.record.history import HISTORY_NAME, History, read_history
from training.record.registry import register_model
from training.record.tracking import ModelVersion, Tracking, mlflow_client
from training.run import TrainResult, train_in_process


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def free_port() -> int:
    """A port of this machine at which nobody answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def lines(*steps: int, **values: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "mode": "video", "loss_nats_per_dim": -step / 7, "time_s": 1e9 + step}
        | values
        for step in steps
    ]


def logged(uri: str, run_id: str | None, name: str = "video/loss_nats_per_dim") -> list[int]:
    """The steps that a store has a metric of, in order, one for each time it was logged."""
    assert run_id is not None
    return sorted(m.step for m in mlflow_client(uri).get_metric_history(run_id, name))


def tracked(uri: str, out: Path, **changes: Any) -> Sender:
    out.mkdir(exist_ok=True)
    return Sender(out, Tracking(uri, "tests", "a run", **changes))


def test_every_step_is_there_once_however_often_it_is_sent(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sender = tracked(uri, out)
    History(out / HISTORY_NAME, 0).append(lines(*range(5)))
    sender.send()
    sender.send()
    # A killed run went back to its checkpoint, and takes two steps again, at another time.
    resumed = History(out / HISTORY_NAME, 3)
    resumed.append([{**line, "time_s": 2e9} for line in lines(3, 4, 5)])
    sender.send()
    assert (sender.steps, logged(uri, sender.tracking.run_id)) == (6, list(range(6)))
    # Who comes later asks the store how far it is.
    resumed.append(lines(6))
    later = send_folder(out)
    assert later.tracking.run_id == sender.tracking.run_id
    assert logged(uri, sender.tracking.run_id) == list(range(7))


def test_a_batch_whose_answer_never_came_is_not_there_twice(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    out, log_batch = tmp_path / "out", MlflowClient.log_batch
    sender = tracked(uri, out)
    History(out / HISTORY_NAME, 0).append(lines(*range(4)))

    def lost(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        log_batch(self, *args, **kwargs)
        raise TimeoutError("the answer is lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lost)
        with pytest.raises(TimeoutError):
            sender.send()
    sender.send()
    assert logged(uri, sender.tracking.run_id) == list(range(4))


def test_many_values_are_sent_in_calls_that_mlflow_takes(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    many = {f"value_{i}": i for i in range(300)}
    sender = tracked(uri, out)
    History(out / HISTORY_NAME, 0).append(lines(*range(8), **many))
    sender.send()
    assert logged(uri, sender.tracking.run_id, "value_299") == list(range(8))
    assert logged(uri, sender.tracking.run_id, "steps_recorded") == [2, 5, 7]


def test_a_run_whose_creation_nobody_heard_of_is_found_again(uri: str, tmp_path: Path) -> None:
    sender = tracked(uri, tmp_path / "out")
    sender.send()
    run_id = sender.tracking.run_id
    again = Sender(tmp_path / "out", replace(sender.tracking, run_id=None))
    again.send()
    assert again.tracking.run_id == run_id
    mlflow_client(uri).delete_run(run_id)
    replaced = Sender(tmp_path / "out", replace(again.tracking, identity="another"))
    replaced.send()
    assert replaced.tracking.run_id != run_id


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(
    uri: str, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def look(model_dir: Path, folder: Path) -> list[Path]:
        assert (model_dir / "config.json").is_file()
        folder.mkdir(exist_ok=True)
        (folder / "sheet.png").write_bytes(b"a picture")
        return [folder / "sheet.png"]

    def go(steps: int) -> str:
        config = small_config(
            steps=steps,
            optimizer={"schedule_steps": 6},
            tracking={"enabled": True, "uri": uri},
            evaluation={"every_steps": 3, "clips": 3},
        )
        request = small_request(dataset, out, config, name="tiny")
        result = train_in_process(request, look)
        assert result.mlflow_run_id is not None
        return result.mlflow_run_id

    run_id = go(3)
    assert go(6) == run_id
    assert go(6) == run_id, "found finished"
    client = mlflow_client(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"tiny {tmp_path.name}/out"
    assert run.data.params["flow.deep_width"] == "32"
    # A parameter cannot be changed there; what is true now stands beside it.
    assert run.data.params["train.steps"] == "3"
    assert run.data.tags["now.train.steps"] == "6"
    assert run.data.tags["changes"] == "step 3: train.steps 3 → 6"
    assert (run.data.tags["recipe"], run.data.tags["model_size"]) == ("tiny", "92K")
    history = read_history(out / HISTORY_NAME)
    for mode in ("video", "image"):
        metrics = client.get_metric_history(run_id, f"{mode}/loss_nats_per_dim")
        assert [(m.step, m.value) for m in metrics] == [
            (r["step"], r["loss_nats_per_dim"]) for r in history if r["mode"] == mode
        ]
    assert logged(uri, run_id, "step_s") == list(range(6))
    assert logged(uri, run_id, "held_out_nats_per_dim") == [2, 5]
    contexts = [i.tags[0].value for i in run.inputs.dataset_inputs]
    assert sorted(contexts) == ["held_out", "train"]
    files = {file.path for file in client.list_artifacts(run_id)}
    assert files == {"train.json", "history.jsonl", "samples"}
    add_to_record(out, {"evaluation/nats": 0.25}, [dataset / "dataset.json"])
    assert client.get_run(run_id).data.metrics["evaluation/nats"] == 0.25
    assert "dataset.json" in {file.path for file in client.list_artifacts(run_id)}
    assert client.get_run(run_id).info.status == "FINISHED"
    # One version for each end, from this run and these data; the better one is the best.
    losses = {
        version.tags["steps"]: float(version.tags["held_out_nats_per_dim"])
        for version in client.search_model_versions(f"run_id = '{run_id}'")
    }
    assert losses.keys() == {"3", "6"}
    best = client.get_model_version_by_alias("tiny", "best")
    assert float(best.tags["held_out_nats_per_dim"]) == min(losses.values())
    assert best.tags["dataset_digest"] == run.data.tags["dataset_digest"]
    assert Path(best.source) == out / "model"


def test_the_alias_best_follows_the_loss_on_the_same_data(uri: str, tmp_path: Path) -> None:
    sender = tracked(uri, tmp_path / "out")
    sender.send()
    client = mlflow_client(uri)
    run = client.get_run(sender.tracking.run_id)

    def best_after(steps: int, loss: float, data: str) -> str:
        tags = {"steps": str(steps), "held_out_nats_per_dim": str(loss), "dataset_digest": data}
        register_model(client, run, ModelVersion("tiny", str(tmp_path), tags))
        return str(client.get_model_version_by_alias("tiny", "best").tags["steps"])

    assert best_after(1, 0.5, "a") == "1"
    assert best_after(2, 0.6, "a") == "1"
    assert best_after(3, 0.4, "a") == "3"
    assert best_after(4, 0.9, "b") == "4", "losses on other data do not compare"


def test_a_dead_server_costs_a_run_nothing_and_it_is_sent_later(
    uri: str, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("training.record.feed.END_S", 0.5)
    out, dead = tmp_path / "out", f"http://127.0.0.1:{free_port()}"
    config = small_config(tracking={"enabled": True, "uri": dead})
    with caplog.at_level(logging.WARNING, "training.record.feed"):
        result = train_in_process(small_request(dataset, out, config))
    assert (result.steps, result.mlflow_run_id) == (6, None)
    assert (result.model_dir / "config.json").is_file()
    started, ended = said(caplog)
    assert f"MLflow at {dead} does not take this run" in started
    assert f"`flowreel track {out}` sends the rest" in ended
    assert "\n" not in started + ended
    with pytest.raises(TrackingError, match="does not take"):
        send_folder(out)
    sent = send_folder(out, uri=uri)
    assert sent.tracking.is_complete
    assert logged(uri, sent.tracking.run_id, "step_s") == list(range(6))
    run = mlflow_client(uri).get_run(sent.tracking.run_id)
    assert (run.info.status, run.data.tags["steps"]) == ("FINISHED", "6")


def test_a_folder_that_was_not_tracked_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"has no tracking\.json"):
        send_folder(tmp_path)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the feed has said so far."""
    return [r.getMessage() for r in caplog.records if r.name == "training.record.feed"]


@contextmanager
def server(port: int, folder: Path) -> Iterator[Callable[[], None]]:
    """A real MLflow server over a store in `folder`; call what is yielded to kill it."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    # Its queue of jobs would be more processes.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.txt").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def kill() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "server.txt").read_text()
        yield kill
    finally:
        kill()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    """As long as it takes; the test's own time limit ends it."""
    while not true():
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_killed_and_started_again_has_every_step_once(
    empty_mlflow_store: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(empty_mlflow_store, tmp_path / "mlflow.db")
    port, out, real = free_port(), tmp_path / "out", tmp_path / "real"
    uri = f"http://127.0.0.1:{port}"

    def go(steps: int) -> TrainResult:
        tracking = {"enabled": True, "uri": uri}
        config = small_config(steps=steps, tracking=tracking, optimizer={"schedule_steps": 6})
        return train_in_process(small_request(dataset, real, config, name="tiny"))

    out.mkdir()
    history = History(out / HISTORY_NAME, 0)
    # Nobody answers when the run starts.
    feed = Feed(out, Tracking(uri, "tests", "a run"), retry_s=0.2)
    history.append(lines(*range(20)))
    wait_until(lambda: len(said(caplog)) == 1)
    with server(port, tmp_path) as kill:
        wait_until(lambda: steps_of(feed) == 20)
        begun = go(3)
        kill()
        history.append(lines(*range(20, 40)))
        wait_until(lambda: len(said(caplog)) == 3)
        assert steps_of(feed) == 20
        # Gone on with, and finished, while nobody answers.
        assert go(6).mlflow_run_id == begun.mlflow_run_id
        assert "sends the rest" in said(caplog)[-1]
    with server(port, tmp_path):
        wait_until(lambda: steps_of(feed) == 40)
        history.append(lines(*range(40, 60)))
        feed.close("FINISHED", artifacts=(HISTORY_NAME,))
        assert feed.tracking.is_complete
        client, run_id = mlflow_client(uri), feed.tracking.run_id
        assert logged(uri, run_id) == list(range(60))
        assert client.get_run(run_id).info.status == "FINISHED"
        assert [file.path for file in client.list_artifacts(run_id)] == [HISTORY_NAME]
        sent = send_folder(real)
        assert sent.tracking.run_id == begun.mlflow_run_id
        assert logged(uri, sent.tracking.run_id, "step_s") == list(range(6))
        assert client.get_run(sent.tracking.run_id).info.status == "FINISHED"
        # A server takes no path of another machine, so the model is an artifact.
        versions = client.search_model_versions("name = 'tiny'")
        assert sorted(version.tags["steps"] for version in versions) == ["3", "6"]
        files = client.list_artifacts(sent.tracking.run_id, "model")
        assert "model/config.json" in {file.path for file in files}


def steps_of(feed: Feed) -> int:
    """How many steps its store has, as far as it knows."""
    return feed._sender.steps
