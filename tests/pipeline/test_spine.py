"""The spine from end to end: one real `flowreel demo` at its smallest, and what follows it."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from media.read import read_video
from pipeline.client import Request, VideoClient
from tests.pipeline import command
from tests.places import ROOT

MICRO = (
    "world.num_clips=40", "world.num_images=8", "world.clips_per_shard=24", "train.steps=6",
    "train.checkpoints.every_steps=3", "train.denoiser_from_step=2", "train.batches.batch_size=4",
    "train.batches.image_batch_size=4",
    "model.deep_width=64", "model.shallow_width=32",
    "model.layers_per_block=[1,1,1,2]", "model.denoiser_layers=2", "evaluate.prompts=4",
    "evaluate.noise_draws=2",
)  # fmt: skip
SETTINGS = [part for value in MICRO for part in ("--set", value)]
SAMPLES = 48
VIDEOS = 6 + 8 + 4
"""Made by the model; real ones, with what the codec leaves of them; by the weights that ship."""


def flowreel(*arguments: str, mark: str = "", timeout_s: float = 280) -> str:
    """Standard output of a command that succeeds."""
    ended = command.flowreel(
        *arguments, timeout_s=timeout_s, environment={"FLOWREEL_TEST_MARK": mark}
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, mark = tmp_path_factory.mktemp("demo") / "run", secrets.token_hex(8)
    flowreel("demo", "--out", str(out), *SETTINGS, mark=mark)
    assert command.none_left(mark), "the demo left processes behind"
    return out


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, object]:
    values = json.loads((run / "summary.json").read_text())
    assert isinstance(values, dict)
    return values


def test_the_summary_holds_every_figure_it_promises(summary: dict[str, object]) -> None:
    for name in (
        "held_out_nats_per_dim", "gaussian_nats_per_dim", "shuffled_caption_nats_per_dim",
        "colour_accuracy", "shape_accuracy", "motion_accuracy", "colour_chance",
        "shape_after_codec", "codec_psnr_db", "overlap_s", "noise_floor_nats_per_dim",
    ):  # fmt: skip
        assert isinstance(summary[name], float), name
        assert np.isfinite(summary[name]), name
    assert summary["overlap_s"] > 0  # type: ignore[operator]
    assert summary["codec_psnr_db"] >= 27  # type: ignore[operator]


def test_every_sample_has_exactly_one_status(run: Path, summary: dict[str, object]) -> None:
    rows = [
        row
        for path in run.glob("latents/status/**/*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    assert len(rows) == SAMPLES
    assert len({(row["shard"], row["key"]) for row in rows}) == SAMPLES
    assert sum(summary["statuses"].values()) == SAMPLES  # type: ignore[attr-defined]


def test_videos_play_and_have_the_length_that_was_asked_for(run: Path) -> None:
    lengths = {
        path.name.split("-0")[0].split("-1")[0]: len(read_video(path).frames)
        for path in run.glob("*.mp4")
    }
    real = {"real-clip": 17, "real-after-the-codec": 17, "shipped-weights": 17}
    assert lengths == {"text-to-video": 17, "image-to-video": 17, "long-video": 57, **real}
    assert len(list(run.glob("*.mp4"))) == VIDEOS


def test_the_report_opens_without_a_server(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == VIDEOS
    assert page.count("<svg") == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "something is loaded from elsewhere"


def served_frames(run: Path, mp4: Path) -> np.ndarray:
    """The lossless frames that the service kept beside the mp4 it sent."""
    (folder,) = [
        path.parent
        for path in (run / "served").rglob("video.mp4")
        if path.read_bytes() == mp4.read_bytes()
    ]
    frames = np.load(folder / "frames.npy", allow_pickle=False)
    assert isinstance(frames, np.ndarray)
    return frames


def test_sample_makes_the_served_video_frame_for_frame(run: Path, tmp_path: Path) -> None:
    from pipeline.make_video import VideoOptions, sample_video
    from pipeline.recipes import load_recipe
    from pipeline.stages import judged_prompts

    recipe = load_recipe(str(run / "recipe.yaml"))
    prompt = judged_prompts(recipe)[0].text
    frames = sample_video(recipe, run / "train" / "model", VideoOptions(prompt), tmp_path / "a.mp4")
    assert np.array_equal(frames, served_frames(run, next(run.glob("text-to-video-000*.mp4"))))


@pytest.mark.slow
def test_likelihood_prints_a_mean_with_its_standard_error(run: Path, tmp_path: Path) -> None:
    video = next(run.glob("text-to-video-000*.mp4"))
    asked = (
        "likelihood",
        str(run / "train" / "model"),
        str(video),
        "--prompt",
        "a red circle",
        "--draws",
        "3",
    )
    said = flowreel(*asked)
    match = re.search(r"loss\s+(-?\d+\.\d+) ± (\d+\.\d+) nats/dim", said)
    assert match is not None, said
    assert float(match.group(1)) > 0.5 + np.log(0.3)
    picture = tmp_path / "surprise.png"
    again = flowreel(*asked, "--per-token", str(picture))
    assert picture.stat().st_size > 10_000
    assert again.splitlines()[-7:-1] == said.splitlines()[-6:], "seeded draws give the same figures"


@pytest.mark.slow
def test_prepare_and_train_run_again_do_nothing(run: Path) -> None:
    def state() -> dict[str, float]:
        files = [
            p
            for folder in ("latents", "train/checkpoints", "train/model")
            for p in (run / folder).rglob("*")
        ]
        return {str(p): p.stat().st_mtime for p in files if p.is_file() and p.name != ".lock"}

    before = state()
    recipe = str(run / "recipe.yaml")
    said = flowreel(
        "prepare",
        "--shards",
        str(run / "shards"),
        "--out",
        str(run / "latents"),
        "--recipe",
        recipe,
    )
    assert "nothing to do" in said
    said = flowreel(
        "train", "--data", str(run / "latents"), "--out", str(run / "train"), "--recipe", recipe
    )
    assert "nothing to do" in said
    after = state()
    assert {k: v for k, v in after.items() if k in before} == before


@pytest.mark.slow
def test_a_recipe_runs_as_a_job_of_a_ray_cluster(run: Path, tmp_path: Path) -> None:
    import ray

    from pipeline.cluster import submit
    from pipeline.recipes import load_recipe

    shutil.copy(run / "shards" / "images-00000.tar", tmp_path / "0.tar")
    out = tmp_path / "latents"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so spelled by Ray
    context = ray.init(
        num_cpus=2,
        include_dashboard=True,
        dashboard_port=0,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    try:
        job = submit(
            load_recipe(str(run / "recipe.yaml")),
            f"http://{context.address_info['webui_url']}",
            stage="prepare",
            arguments=["--shards", str(tmp_path), "--out", str(out)],
            timeout_s=240,
        )
    finally:
        ray.shutdown()
    assert job.status == "SUCCEEDED", job.logs
    rows = [
        row for path in out.glob("status/**/*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert len(rows) == 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_demo_runs_as_a_job_submitted_from_the_command_line(
    run: Path, tmp_path: Path
) -> None:
    import ray

    out = tmp_path / "job"
    context = ray.init(num_cpus=2, include_dashboard=True, dashboard_port=0, log_to_driver=False)
    try:
        address = f"http://{context.address_info['webui_url']}"
        recipe = str(run / "recipe.yaml")
        said = flowreel(
            "submit", recipe, "--address", address, "--", "--out", str(out), timeout_s=500
        )
    finally:
        ray.shutdown()
    assert "SUCCEEDED" in said
    assert (out / "report.html").is_file()
    assert len(list(out.glob("*.mp4"))) == VIDEOS
    assert json.loads((out / "summary.json").read_text())["steps"] == 6


@pytest.mark.soak
def test_the_demo_takes_real_panda_clips(tmp_path: Path) -> None:
    panda = Path(os.environ.get("FLOWREEL_PANDA_SAMPLES", ROOT.parent / "shared" / "panda_samples"))
    if not panda.is_dir():
        pytest.skip(f"no {panda}; set FLOWREEL_PANDA_SAMPLES")
    out = tmp_path / "run"
    flowreel("demo", "--shards", str(panda), "--out", str(out), *SETTINGS)
    summary = json.loads((out / "summary.json").read_text())
    samples = sum(len(read_keys(path)) for path in panda.glob("*.tar"))
    assert sum(summary["statuses"].values()) == samples
    assert summary["statuses"]["kept"] > 0.8 * samples
    assert len(list(out.glob("image-to-video*.mp4"))) == len(list(out.glob("long-video*.mp4"))) == 1
    # The videos that are shown were prompted with captions of these very clips.
    shown = {path.stem for path in out.glob("long-video*.mp4")}
    assert not any("circle" in name or "square" in name for name in shown)


def read_keys(tar: Path) -> set[str]:
    """Keys of the samples in a shard."""
    with tarfile.open(tar) as members:
        return {member.name.split(".")[0] for member in members}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_serve_answers_where_it_is_told_until_it_is_stopped(
    run: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    mark, port = secrets.token_hex(8), free_port()
    served = subprocess.Popen(
        [*command.PYTHON, "serve", str(run / "train" / "model"), "--json", "--set",
         f"serve.port={port}", "--data-dir", str(tmp_path)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "FLOWREEL_TEST_MARK": mark},
    )  # fmt: skip
    try:
        assert served.stdout is not None
        text = "".join(iter(served.stdout.readline, "}\n"))
        url = json.loads(text + "}")["url"]
        assert url == f"http://127.0.0.1:{port}"
        with VideoClient(url) as client:
            video = client.make(Request("text to video", "a red circle", 5, 1), tmp_path)
        assert video.frames.shape == (5, 64, 64, 3)
        served.send_signal(number)
        assert served.wait(60) == code
    finally:
        served.kill()
        served.communicate()
    assert command.none_left(mark)


def test_imported_reference_weights_make_a_model_folder(tmp_path: Path) -> None:
    goldens = Path(os.environ.get("FLOWREEL_GOLDENS", ROOT.parent / "shared" / "goldens"))
    case = goldens / "video"
    if not case.is_dir():
        pytest.skip(f"no {case}; set FLOWREEL_GOLDENS")
    out = tmp_path / "model"
    flowreel(
        "import-weights",
        str(case / "weights.pth"),
        "--config",
        str(case / "config.yaml"),
        "--out",
        str(out),
    )
    assert json.loads((out / "config.json").read_text())["flow"]["deep_width"] == 96
    assert (out / "model.safetensors").stat().st_size > 1e6


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(run: Path) -> None:
    before = sorted(p.name for p in (run / "train" / "checkpoints").iterdir())
    line = command.refused(
        "train", "--data", str(run / "latents"), "--out", str(run / "train"),
        "--recipe", str(run / "recipe.yaml"), "--set", "model.deep_width=96", "--steps", "9",
    )  # fmt: skip
    assert "deep_width" in line
    assert "64" in line
    assert "96" in line
    assert sorted(p.name for p in (run / "train" / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_a_prompt_over_the_limit_is_refused_with_both_numbers(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    line = command.refused(
        "sample", str(run / "train" / "model"), "--prompt", "x" * 5000, "--out", str(out)
    )
    assert "5000" in line
    assert "4096" in line
    assert not out.exists()


def test_a_video_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    line = command.refused(
        "likelihood", str(run / "train" / "model"), str(tmp_path / "broken.mp4"), "--prompt", "x"
    )
    assert "broken.mp4" in line or "video" in line


def test_the_contact_sheet_is_a_picture(run: Path) -> None:
    from PIL import Image

    with Image.open(io.BytesIO((run / "contact_sheet.png").read_bytes())) as sheet:
        assert sheet.size[0] > 400
        assert np.asarray(sheet).std() > 10
