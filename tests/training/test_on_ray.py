"""Training on a real Ray cluster: equal to one process, live, recorded, clear when it fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from flow.model_folder import load_model
from tests.training.world import small_config, small_request, two_workers, write_dataset
from training.on_ray import TrainingFailed, train_on_ray
from training.run import train_in_process
from training.state.checkpoint import latest_complete

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORKERS = two_workers(shard_granularity="model")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Ray starts workers at low priority; beside other programs that is no progress at all.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_two_ray_workers_train_what_one_process_does(cluster: None, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    seen: list[int] = []
    config = small_config(workers=WORKERS, tracking={"enabled": True})

    def go() -> tuple[int, int | None, str | None, Path]:
        result = train_on_ray(
            small_request(dataset, tmp_path / "ray", config),
            progress=lambda records: seen.extend(r["step"] for r in records),
        )
        return result.steps, result.resumed_from, result.mlflow_run_id, result.model_dir

    steps, resumed, run_id, model_dir = go()
    assert (steps, resumed) == (6, None)
    assert run_id
    assert seen == list(range(6))
    started = time.monotonic()
    assert go() == (6, 6, run_id, model_dir)
    assert time.monotonic() - started < 5, "a finished run starts no workers"
    single = train_in_process(small_request(dataset, tmp_path / "single"))
    one, two = (load_model(d)[0].state_dict() for d in (single.model_dir, model_dir))
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-5


def test_a_failing_worker_is_one_clear_error(cluster: None, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", broken=float("nan"))
    config = small_config(workers=WORKERS, optimizer={"max_consecutive_skips": 2})
    with pytest.raises(TrainingFailed, match="SkippedTooOften: 2 steps in a row") as caught:
        train_on_ray(small_request(dataset, tmp_path / "out", config))
    assert "\n" not in str(caught.value)


def test_an_elastic_run_trains_on_the_workers_that_there_is_room_for(
    cluster: None, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path / "data")
    config = small_config(
        batches={"batch_size": 12, "image_batch_size": 12},
        workers=two_workers(count=4, min_count=1, shard_granularity="model"),
    )
    result = train_on_ray(small_request(dataset, tmp_path / "out", config))
    assert result.steps == 6
    checkpoint = latest_complete(tmp_path / "out/checkpoints")
    assert checkpoint is not None
    assert len([name for name in checkpoint.files if name.endswith(".distcp")]) == 2, "two CPUs"
