"""The benchmark of preparation: what it counts, its bars and, if slow tests run, a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sinks
from benchmarks.clips import write_clips
from benchmarks.feeder import feeder
from benchmarks.prepare import PipelineRun, main, verdicts
from benchmarks.processes import Watch, cpu_seconds, family, pss_bytes
from data_prep.config import BucketConfig, PrepareConfig
from tests.places import TINY_CODEC

TINY = TINY_CODEC
BUSY = """
import time
end = time.process_time() + {seconds}
while time.process_time() < end:
    pass
time.sleep(30)
"""


def test_cpu_time_of_a_whole_family_is_seen_between_the_marks() -> None:
    inner = BUSY.format(seconds=0.6)
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer]) as process:
        try:
            watch = Watch(process.pid, memory=True)
            watch.mark()
            deadline = time.monotonic() + 60
            while len(family(process.pid)) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            child = family(process.pid)[1]
            while cpu_seconds(child) < 0.55 and time.monotonic() < deadline:
                time.sleep(0.05)
            watch.mark()
            time.sleep(1.2)
            watch.stop()
            assert pss_bytes(process.pid) > 2**20
            assert watch.peak_bytes > 2**21
            assert watch.cpu_s()["Ray's own"] >= 0.5
        finally:
            for pid in reversed(family(process.pid)):
                os.kill(pid, 9)


def test_the_rate_leaves_out_the_block_that_ends_the_start_up() -> None:
    # Four samples at once, then one each second for ten seconds.
    run = PipelineRun({"times": [0.0, 0.0, 0.01, 0.01, *map(float, range(1, 11))], "stages": []}, 0)
    assert run.clips_per_s == pytest.approx(1.0)


def test_a_bar_that_is_missed_is_said() -> None:
    assert [met for _, met in verdicts({"ratio": 0.91, "others_cpus": [0.0, 0.02, 0.0]})] == [
        True,
        True,
    ]
    result = {"ratio": 0.89, "memory_ratio": 1.2, "shards": [8, 80], "others_cpus": [0.0, 0.5, 0.0]}
    assert [met for _, met in verdicts(result)] == [False, False, False]


def test_sinks_that_are_slow_or_ask_a_store_for_more_than_before_are_said() -> None:
    def result(core: float, second: float, puts: int) -> dict[str, Any]:
        rates = {"sink 1": {"clips_per_cpu_s": core}, "sink 2": {"clips_per_cpu_s": second}}
        requests = {"requests_few": {"PUT": 2000, "seconds": 1.0}, "store_shards": 1000}
        return {"memory": rates, **requests, "requests": {"PUT": puts, "seconds": 3.0}}

    assert [met for _, met in sinks.verdicts(result(210, 200, 4000))] == [True, True, True]
    assert [met for _, met in sinks.verdicts(result(190, 150, 4001))] == [False, False, False]


@pytest.mark.slow
def test_a_small_benchmark_of_sinks_runs_whole(tmp_path: Path) -> None:
    arguments = ["--scale", "--clips", "64", "--store-shards", "6", "--out", str(tmp_path)]
    code = main(arguments)
    result = json.loads((tmp_path / "sinks.json").read_text())
    assert code == (0 if all(met for _, met in sinks.verdicts(result)) else 1)
    assert result["requests"]["PUT"] == 4 * 6
    assert result["disk"]["sink 2"]["clips_per_s"] > 0


def test_the_feeder_says_how_busy_the_encoder_was(tmp_path: Path) -> None:
    config = PrepareConfig(bucket=BucketConfig(num_frames=5, height=32, width=32))
    shards = write_clips(tmp_path, 4, 4, (32, 32), 5, 8.0)
    fed = feeder(config, shards, str(TINY), "cpu", 1, 6)
    assert 0 < fed["busy_share"] <= 1
    assert fed["clips_per_s"] > 0


@pytest.mark.soak
def test_a_small_comparison_runs_whole(tmp_path: Path) -> None:
    arguments = ["--bucket", "5x32x32", "--source", "32x32", "--clips", "40", "--per-shard", "10"]
    code = main([*arguments, "--seconds", "4", "--no-memory", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "prepare.json").read_text())
    assert code == (0 if all(met for _, met in verdicts(result)) else 1)
    assert [stage["name"] for stage in result["stages"]] == [
        "read", "decode", "caption", "encode", "sink"
    ]  # fmt: skip
    assert all(stage["rows"] >= 40 for stage in result["stages"])
    assert result["bottleneck"] in {stage["name"] for stage in result["stages"]}
