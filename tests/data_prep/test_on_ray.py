"""The same on a real Ray cluster: an operator a stage, equal to one process, killed, resumed."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks.sinks import block_of, job_of
from data_prep.clips.decode import DecodeStage
from data_prep.config import BucketConfig, ConcurrencyConfig, PrepareConfig
from data_prep.ledger.on_ray import Sink, running_sinks
from data_prep.ledger.reuse import Reuse
from data_prep.on_ray import Decode, build_pipeline, prepare
from data_prep.progress import RunState
from data_prep.resources import describe, plan_resources
from data_prep.row import rows_of, table_of
from data_prep.run import plan_run
from data_prep.sources.on_ray import ShardSource
from data_prep.sources.samples import write_shard
from data_prep.stages import StageChain
from data_prep.storage.location import StorageError
from data_prep.world.shards import write_world
from tests.data_prep.bad_media import (
    moving,
    sample,
    video,
)
from tests.data_prep.in_process import (
    decode_row,
    digests,
    prepare_locally,
)
from tests.data_prep.ray_cluster import RAY_ENVIRONMENT
from tests.places import ROOT


def test_the_whole_run_on_ray_equals_one_process(
    cluster: None, config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(world[0]).read_bytes()[:15_000])
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"junk" * 500)
    shards = [*world, str(cut), str(junk)]
    bucket = config.bucket.model_copy(update={"resolutions": ("24p", "36p")})
    changes = {"windows_per_clip": 2, "bucket": bucket, "concurrency": ConcurrencyConfig(sinks=2)}
    config = config.model_copy(update=changes)
    states: list[RunState] = []
    report = prepare(
        config,
        shards,
        tmp_path / "ray",
        codec_dir,
        progress=states.append,
    )
    local = prepare_locally(config, shards, tmp_path / "local", codec_dir)
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert report.counts == local.counts
    assert report.samples_now == report.total == sum(n for _, _, n in report.rows())
    assert states[0] == RunState(shards=0, of_shards=5)
    assert (states[-1].shards, states[-1].samples) == (5, report.total)
    assert states[-1].by_status == report.counts
    assert [s.samples for s in states] == sorted(s.samples for s in states)
    stages = ["read", "decode", "caption", "encode", "sink"]
    assert list(states[-1].stages) == stages
    assert all(busy.spent_s > 0 and busy.workers > 0 for busy in states[-1].stages.values())
    assert [stage.name for stage in report.stages] == stages
    rows = [
        (row["shard"], row["key"])
        for path in (tmp_path / "ray" / "status").iterdir()
        for row in pq.read_table(path).to_pylist()
    ]
    assert len(rows) == len(set(rows)) == report.total

    filters = config.filters.model_copy(update={"static_below": 0.01})
    other = config.model_copy(update={"filters": filters})
    again = prepare(other, shards, tmp_path / "ray", codec_dir, redo=True)
    prepare_locally(other, shards, tmp_path / "other", codec_dir)
    assert digests(tmp_path / "ray") == digests(tmp_path / "other")
    assert again.reused_now == again.counts["kept"] == report.counts["kept"]


@pytest.mark.slow
def test_a_run_of_one_shard_has_nothing_to_warn_of(
    cluster: None,
    config: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert prepare(config, world[:1], tmp_path, codec_dir).counts == {"kept": 4}
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]


def test_the_error_of_a_sink_comes_out_as_it_was_raised(
    cluster: None, config: PrepareConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    block = block_of("a", [0], (b"", b""), (0,))
    with (
        running_sinks(config, str(tmp_path / "file" / "out"), [job_of("a")], 2) as sinks,
        pytest.raises(StorageError, match=r"cannot lock .*run the same command again"),
    ):
        next(Sink(sinks)(block))


def test_every_stage_is_an_operator_of_its_own(
    cluster: None, config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan = plan_run(config, world, tmp_path, str(codec_dir))
    resources = plan_resources(2.0, 0.0, config.concurrency)
    pipeline = build_pipeline(plan, config, resources, [])
    physical, _ = get_execution_plan(pipeline._logical_plan)
    names = []
    operator = physical.dag
    while operator is not None:
        names.append(operator.name)
        operator = operator.input_dependencies[0] if operator.input_dependencies else None
    stages = ["Read", "Decode", "Caption", "Encode", "Sink"]
    operators = [name for name in reversed(names) if name != "Input"]
    assert len(operators) == len(stages)
    assert all(stage in name for stage, name in zip(stages, operators, strict=True))
    assert not any("->" in name for name in operators)


@pytest.mark.slow
def test_the_stages_overlap_in_time_and_pools_keep_to_their_bounds(
    cluster: None, config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    """By Ray Data's own account: each stage has begun before the one ahead of it has ended.

    Reading is left out: a few MB are read before the first decoder has started.
    """
    clip = video(moving(110, 480, 640))
    for shard in range(2):
        samples = [sample(f"{number:02d}", mp4=clip) for number in range(30)]
        write_shard(tmp_path / "in" / f"{shard}.tar", samples)
    shards = [str(path) for path in sorted((tmp_path / "in").iterdir())]
    wanted = ConcurrencyConfig(decoders=(1, 2), encoders=(1, 2))
    bucket = BucketConfig(num_frames=17, height=32, width=32)
    config = config.model_copy(
        update={"concurrency": wanted, "bucket": bucket, "windows_per_clip": 3}
    )
    plan = plan_run(config, shards, tmp_path / "out", str(codec_dir))
    resources = plan_resources(2.0, 0.0, wanted)
    assert "decode 1–2×" in describe(resources, 2.0)
    with running_sinks(config, plan.out, plan.jobs, 1) as sinks:
        pipeline = build_pipeline(plan, config, resources, sinks)
        batches = pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        assert sum(table.num_rows for table in batches) == 60 + 2
    assert "Operator 5 MapBatches(Sink)" in pipeline.stats()
    stages: list[Any] = []
    summary = pipeline.get_stats_summary()
    while summary is not None:
        stages = [*summary.operators_stats, *stages]
        summary = summary.parents[0] if summary.parents else None
    assert len(stages) == 5
    for before, after in itertools.pairwise(stages[1:]):
        assert after.earliest_start_time < before.latest_end_time, (before, after)


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [1, 2])
def test_no_machine_is_too_small_to_finish(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path, cpus: int
) -> None:
    """In a cluster of its own with so few CPUs, asked for far more actors than it can run."""
    wanted = ConcurrencyConfig(shards_in_flight=3, decoders=(1, 8), captioners=2, encoders=(1, 8))
    config = config.model_copy(update={"concurrency": wanted})
    command = [sys.executable, "-c", DRIVER.replace("num_cpus=2", f"num_cpus={cpus}")]
    arguments = [config.model_dump_json(), str(tmp_path / "out"), str(codec_dir), *world]
    environment = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], check=True, cwd=ROOT, env=environment, timeout=200)
    prepare_locally(config, world, tmp_path / "local", codec_dir)
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


def test_an_operator_that_is_deleted_closes_its_stage(config: PrepareConfig) -> None:
    operator = Decode(config, [(32, 32)], Reuse())
    stage = operator._stage
    assert isinstance(stage, StageChain)
    decode = stage.stages[0]
    assert isinstance(decode, DecodeStage)
    (row,) = rows_of(next(operator(table_of([decode_row(media=video(moving(20)))]))))
    assert row["frames_shape"] == [5, 32, 32, 3]
    child = decode.reader._child
    assert child is not None
    assert child.poll() is None
    del operator
    gc.collect()
    assert child.poll() is not None


CLOSING_DRIVER = """
import sys, ray
from pathlib import Path
log = sys.argv[4]

def watch():
    # In every worker: say which stage is closed.
    from data_prep.captions.stage import CaptionStage
    from data_prep.clips.decode import DecodeStage
    from data_prep.latents.encode import EncodeStage
    from data_prep.stages import FilterStage

    def watched(stage):
        close = stage.close
        def call(self):
            close(self)
            with open(log, "a") as file:
                file.write(stage.__name__ + "\\n")
        stage.close = call
    for stage in (DecodeStage, FilterStage, CaptionStage, EncodeStage):
        watched(stage)

environment = {"worker_process_setup_hook": watch}
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
config = PrepareConfig.model_validate_json(sys.argv[1])
prepare(config, sys.argv[5:], Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_every_stage_is_closed_when_a_run_ends(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "closed"
    command = [sys.executable, "-c", CLOSING_DRIVER, config.model_dump_json()]
    arguments = [str(tmp_path / "out"), str(codec_dir), str(log), *world]
    environment = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], check=True, cwd=ROOT, env=environment, timeout=240)
    stages = {"DecodeStage", "FilterStage", "CaptionStage", "EncodeStage"}
    assert set(log.read_text().split()) == stages


def test_finished_shards_never_become_a_read_task(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    prepare_locally(config, world[:1], tmp_path, codec_dir)
    plan = plan_run(config, world, tmp_path, str(codec_dir))
    tasks = ShardSource(plan.jobs, config, plan.out).get_read_tasks(200)
    files = [file for task in tasks for file in task.metadata.input_files or ()]
    assert files == world[1:]


def test_a_repeated_read_task_gives_the_same_blocks_whatever_was_staged_meanwhile(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    """Ray drops as many blocks of the repetition as it had: fewer new ones would lose samples."""
    prepare_locally(config, world[:1], tmp_path, codec_dir, stop_after=1)
    plan = plan_run(config, world[:1], tmp_path, str(codec_dir))
    (task,) = ShardSource(plan.jobs, config, plan.out).get_read_tasks(1)
    first = [block.to_pylist() for block in task()]
    assert [row["number"] for block in first for row in block] == [1, 2, 3, -1]
    prepare_locally(config, world[:1], tmp_path, codec_dir, stop_after=2)
    assert [block.to_pylist() for block in task()] == first


def test_running_again_is_quick_and_needs_no_ray(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    """In a process of its own, where Ray was never started."""
    prepare_locally(config, world, tmp_path, codec_dir)
    before = digests(tmp_path)
    script = (
        "import sys, ray\nfrom pathlib import Path\n"
        "from data_prep.config import PrepareConfig\nfrom data_prep.on_ray import prepare\n"
        "config = PrepareConfig.model_validate_json(sys.argv[1])\n"
        "report = prepare(config, sys.argv[4:], Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "assert not ray.is_initialized() and 'torch' not in sys.modules\n"
        "assert report.seconds < 2 and report.samples_now == 0, report\n"
        "assert report.total == 11, report\n"
    )
    command = [sys.executable, "-c", script, config.model_dump_json(), str(tmp_path)]
    subprocess.run([*command, str(codec_dir), *world], check=True, cwd=ROOT, timeout=120)
    assert digests(tmp_path) == before


DRIVER = """
import sys, ray
from pathlib import Path
from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
config = PrepareConfig.model_validate_json(sys.argv[1])
prepare(config, sys.argv[4:], Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    shards = [str(p) for p in write_world(tmp_path / "in", 90, 30, clips_per_shard=30)]
    # A block a sample: otherwise a shard is one block, and nothing is left to take up within it.
    concurrency = ConcurrencyConfig(shards_in_flight=2, block_bytes=1)
    config = config.model_copy(update={"concurrency": concurrency})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    prepare_locally(config, shards, whole, codec_dir)
    command = [sys.executable, "-c", DRIVER, config.model_dump_json(), str(broken), str(codec_dir)]
    environment = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    kills = 0
    for wanted in (3, 40):
        with subprocess.Popen([*command, *shards], cwd=ROOT, env=environment) as driver:
            deadline = time.monotonic() + 500
            while driver.poll() is None and time.monotonic() < deadline:
                if _finished(broken) >= wanted:
                    break
                time.sleep(0.05)
            if driver.poll() is None:
                os.kill(driver.pid, signal.SIGKILL)
                kills += 1
        if wanted == 3:
            assert 3 <= _finished(broken) < 120
    assert kills >= 1
    stamps = {p: p.stat().st_mtime_ns for p in (broken / "manifests").glob("*.json")}
    subprocess.run([*command, *shards], check=True, cwd=ROOT, env=environment, timeout=600)
    assert digests(broken) == digests(whole)
    # What was finished before the kill was not written again.
    assert all(path.stat().st_mtime_ns == mtime_ns for path, mtime_ns in stamps.items())


def _finished(out: Path) -> int:
    staged = sum(1 for _ in out.glob("staging/*/*/*.arrow"))
    return staged + 30 * sum(1 for _ in out.glob("manifests/*.json"))


@pytest.mark.slow
def test_real_panda_clips_go_through(
    cluster: None, config: PrepareConfig, panda_samples: Path, codec_dir: Path, tmp_path: Path
) -> None:
    shards = [str(path) for path in sorted(panda_samples.glob("*.tar"))]
    report = prepare(config, shards, tmp_path, codec_dir)
    assert report.counts == {"failed": 6, "kept": 48}
    assert report.reasons == {"failed_to_download": 6}
