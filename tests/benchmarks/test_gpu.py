"""The GPU benchmark's promises: a faulty part costs only itself, and what was measured is kept."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import clip, codec
from benchmarks.gpu.correctness import Answers, _rows
from benchmarks.gpu.fixtures import REFERENCE, read_released_yaml
from benchmarks.gpu.parts import BUSY_GOAL, BY_NAME, PARTS, PASS_GOAL
from benchmarks.gpu.recorder import PlannedFault, Recorder
from benchmarks.gpu.report import (
    COMPLETE,
    FAILED,
    NOT_RUN,
    OUT_OF_TIME,
    RUNNING,
    PartResult,
    Report,
)
from benchmarks.gpu.run import LEAST_S, Plan
from benchmarks.gpu.shapes import FULL, REHEARSAL
from flow.certificate import Certificate
from flow.config import FlowConfig
from flow.sampling import DeepStream
from tests.benchmarks.gpu_runs import command, environment, rehearse
from tests.places import ROOT

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(900)


def parts_of(out: Path) -> dict[str, Any]:
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert isinstance(parts, dict)
    return parts


def rows_of(recorder: Recorder) -> list[dict[str, Any]]:
    line = recorder.line
    assert isinstance(line, io.StringIO)
    return [json.loads(text) for text in line.getvalue().splitlines()]


@pytest.mark.slow
def test_a_failing_part_costs_only_itself(tmp_path: Path) -> None:
    report = Report(tmp_path)
    earlier = PartResult(COMPLETE, made="earlier")
    earlier.take({"table": "figures", "row": {"what": "a figure", "value": 1.0}})
    report.parts["clip"] = earlier
    report.write()
    faults = ("--fail", "machine=raise", "--fail", "pass=exit")
    run = rehearse(tmp_path, "--only", "machine", "pass", "step", *faults)
    assert run.returncode == 1
    parts = parts_of(tmp_path)
    machine = parts["machine"]
    assert machine["state"] == FAILED
    assert machine["message"].endswith("PlannedFault: a fault that was asked for")
    # What it had said before stands.
    assert machine["tables"]["figures"][0]["what"] == "copy bandwidth"
    assert parts["pass"]["state"] == FAILED
    assert parts["pass"]["message"].startswith("ended with exit code 3")
    assert parts["step"]["state"] == COMPLETE
    assert parts["step"]["tables"]["training step"]
    # So do the figures of a part that was not run again.
    assert parts["clip"]["tables"] == earlier.tables
    page = (tmp_path / "gpu.md").read_text()
    assert f"State: {FAILED}. ended with exit code 1" in page


@pytest.mark.slow
def test_a_part_out_of_time_is_ended(tmp_path: Path) -> None:
    # It hangs after its first row; on a busy machine it may not come so far.
    run = rehearse(tmp_path, "--only", "machine", "--minutes", "0.2", "--fail", "machine=hang")
    assert run.returncode == 1
    machine = parts_of(tmp_path)["machine"]
    assert machine["state"] == OUT_OF_TIME
    assert machine["seconds"] >= 11
    rows = machine["tables"].get("figures", [])
    assert [row["what"] for row in rows] in ([], ["copy bandwidth"])


@pytest.mark.slow
def test_a_killed_parent_leaves_what_it_had_and_no_child(tmp_path: Path) -> None:
    with subprocess.Popen(
        command(tmp_path, "--only", "machine", "pass", "--fail", "pass=hang"),
        cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL,
    ) as parent:  # fmt: skip
        try:
            # Its first row is there: now it hangs.
            while not parts_of_or_none(tmp_path).get("pass", {}).get("tables"):
                assert parent.poll() is None
                time.sleep(0.1)
            (child,) = children(parent.pid)
        finally:
            os.kill(parent.pid, signal.SIGKILL)
    parts = parts_of(tmp_path)
    assert parts["machine"]["state"] == COMPLETE
    assert parts["pass"]["state"] == RUNNING
    assert parts["pass"]["tables"]
    assert "copy bandwidth" in (tmp_path / "gpu.md").read_text()
    while Path(f"/proc/{child}").exists():
        time.sleep(0.1)


def parts_of_or_none(out: Path) -> dict[str, Any]:
    return parts_of(out) if (out / "gpu.json").exists() else {}


def children(pid: int) -> list[int]:
    names = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(name) for name in names]


def test_without_time_a_part_is_not_run(tmp_path: Path) -> None:
    run = rehearse(tmp_path, "--minutes", f"{LEAST_S / 61}")
    assert run.returncode == 1
    parts = parts_of(tmp_path)
    assert {part["state"] for part in parts.values()} == {NOT_RUN}
    assert [*parts] == sorted(BY_NAME)


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    arguments = [word for word in command(tmp_path) if word != "--rehearse"]
    run = subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("there is no CUDA device here; --rehearse")
    assert [name for name, part in parts_of(tmp_path).items() if part["tables"]] == []


def test_time_that_a_part_leaves_goes_to_the_next_and_shares_are_kept() -> None:
    names = tuple(BY_NAME)
    plan = Plan(names, 480.0)
    assert sum(part.share for part in PARTS) == pytest.approx(1.0)
    assert plan.limit_s("machine", 480.0) == pytest.approx(480 * PARTS[0].share)
    assert plan.limit_s("likelihood", 33.0) == pytest.approx(33.0)
    used = 480 * PARTS[0].share - 10.0
    assert plan.limit_s("right", 480.0 - used) == pytest.approx(480 * PARTS[1].share + 10.0)


def test_an_attempt_that_fails_is_a_row_and_a_goal_is_judged_on_a_gpu_only() -> None:
    recorder = Recorder(io.StringIO(), limit_s=5.0)

    def broken() -> None:
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    assert recorder.attempt("a large thing", broken) is None
    assert recorder.attempt("a long thing", lambda: 1, needs_s=60.0) is None
    assert recorder.attempt("a thing", lambda: 1) == 1
    recorder.figure("pass", 8.0, "ms", PASS_GOAL)
    large, long, figure = (message["row"] for message in rows_of(recorder))
    assert large == {"what": "a large thing", "why": "OutOfMemoryError: tried to allocate 99 GiB"}
    assert long["why"] == "5 s are left, it may take 60 s"
    assert (figure["goal"], figure["met"]) == ("at most 8.5 ms", True)
    rehearsal = Recorder(io.StringIO(), limit_s=5.0, rehearsal=True, fault="raise")
    with pytest.raises(PlannedFault):
        rehearsal.figure("pass", 8.0, "ms", PASS_GOAL)
    assert rows_of(rehearsal)[0]["row"]["met"] is None


def test_a_device_that_is_off_is_outside_its_tolerance() -> None:
    proof = Certificate(max_abs=0.2, p999_abs=0.1, num_elements=10)
    truth = Answers({"prior": torch.tensor([1.0, -2.0])}, {"sliding": proof})
    coarse = Answers({"prior": torch.tensor([1.01, -2.0])}, {"sliding": proof})
    on_cpu = {"float32": truth, "bfloat16": coarse}
    recorder = Recorder(io.StringIO(), limit_s=5.0)
    near = Answers({"prior": torch.tensor([1.00005, -2.0])}, {"sliding": proof})
    assert _rows(recorder, "case", "float32", near, on_cpu) == [True, True]
    assert _rows(recorder, "case", "float32", coarse, on_cpu) == [False, True]
    assert _rows(recorder, "case", "bfloat16", coarse, on_cpu) == [True, True]
    worse = Answers(
        {"prior": torch.tensor([1.03, -2.0])},
        {"sliding": Certificate(max_abs=0.5, p999_abs=0.3, num_elements=10)},
    )
    assert _rows(recorder, "case", "bfloat16", worse, on_cpu) == [False, False]
    broken = Answers({"prior": torch.tensor([float("nan"), -2.0])}, {"sliding": proof})
    assert _rows(recorder, "case", "float32", broken, on_cpu) == [False, True]
    assert _rows(recorder, "case", "bfloat16", broken, on_cpu) == [False, True]


def test_the_stand_in_reads_a_released_yaml_as_pyyaml_does() -> None:
    yaml = pytest.importorskip("yaml")
    for path in REFERENCE.parent.glob("*/config.yaml"):
        assert read_released_yaml(path.read_text()) == yaml.safe_load(path.read_text())
    with pytest.raises(ValueError, match="line 2"):
        read_released_yaml("arguments:\n  nested: {a: 1}\n")


def test_the_full_shapes_are_the_released_models() -> None:
    assert (FULL.latent_frames, FULL.grid, FULL.tokens) == (21, (30, 53), 33_390)
    assert isinstance(FULL.config, FlowConfig)
    assert FULL.config.layers_per_block[-1] == FULL.step_layers == 24
    assert FULL.contexts[0] == 17_000
    assert FULL.windows[0] == 128


def test_a_dictated_window_takes_the_passes_that_were_counted() -> None:
    recorder = Recorder(io.StringIO(), limit_s=600.0, rehearsal=True)
    counts = clip.Counts(cold=3.0, warm=2.0, sweeps=(4, 5))
    memory: dict[str, clip.Memory] = {}
    clip._deep(recorder, REHEARSAL, CPU, counts, memory)
    rows = [m["row"] for m in rows_of(recorder) if m["table"] == "deep block by frame"]
    # Six tokens a frame: one window each, the later ones running on into the next frame.
    assert [row["passes_made"] for row in rows] == [3, 2, 2]
    assert memory["deep block"].planned_gb > memory["deep block"].weights_gb


def test_tokens_that_are_never_accepted_end_in_an_error() -> None:
    recorder = Recorder(io.StringIO(), limit_s=600.0, rehearsal=True)
    flow = clip._deep_alone(REHEARSAL).requires_grad_(False)
    with torch.no_grad():
        flow.deep.proj_out.bias.fill_(float("nan"))
    spec = clip.SampleSpec(num_frames=1, grid=REHEARSAL.grid, token_tolerance=clip.ALL_ACCEPTED)
    stream = DeepStream(flow, None, None, spec)
    with pytest.raises(RuntimeError, match="not finite"):
        clip.drive(stream.inverter, stream.steps(), most=3)
    assert rows_of(recorder) == []


def test_the_codec_is_timed_where_diffusers_is_installed() -> None:
    pytest.importorskip("diffusers")
    recorder = Recorder(io.StringIO(), limit_s=600.0, rehearsal=True)
    decoded = codec.decode_seconds(recorder, REHEARSAL, CPU)
    encoded = codec.encode_seconds(recorder, REHEARSAL, CPU)
    assert decoded is not None
    assert encoded is not None
    tables = [message["table"] for message in rows_of(recorder)]
    assert tables == ["figures", "codec", "figures", "codec"]


def test_the_goal_of_the_feeder_is_its_own_bar() -> None:
    pytest.importorskip("pyarrow")
    from benchmarks.feeder import BUSY_BAR

    assert BUSY_GOAL.bound == BUSY_BAR


def test_the_full_codec_is_wan22s_own() -> None:
    pytest.importorskip("diffusers")
    from flow.codec import build_vae

    with torch.device("meta"):
        vae = build_vae(codec.codec_config(FULL, rehearsal=False))
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 704.7


@pytest.mark.slow
def test_the_feeder_says_how_busy_the_encoder_is() -> None:
    pytest.importorskip("diffusers")
    recorder = Recorder(io.StringIO(), limit_s=280.0, rehearsal=True)
    codec.feeder(recorder, REHEARSAL, CPU)
    (message,) = rows_of(recorder)
    assert message["row"]["what"] == "encoder busy", message
    assert 0 < message["row"]["value"] <= 1
