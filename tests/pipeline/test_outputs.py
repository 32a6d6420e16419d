"""Full disks, closed pipes and encodings without our characters: said or spelled, never traced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.command import PYTHON, flowreel, one_line
from tests.places import ROOT
from tests.serving.conftest import model_dir as model_dir

PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Switches off what Python does to make up for a locale without UTF-8."""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one page, already taken."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        (tmp_path / "taken").write_bytes(b"\0" * 4096)
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_said_with_the_file_that_found_no_room(
    full_disk: Path, model_dir: Path
) -> None:
    out = full_disk / "video.mp4"
    ended = flowreel("-q", "sample", str(model_dir), "--prompt", "x", "--out", str(out))
    assert ended.returncode == 2
    assert f"{out}: the disk is full: free some space" in one_line(ended.stderr)
    assert [path.name for path in full_disk.iterdir()] == ["taken"], "nothing half-written"


@pytest.mark.slow
def test_a_full_disk_under_the_demo_is_said(full_disk: Path) -> None:
    ended = flowreel("-q", "demo", "--out", str(full_disk / "run"))
    assert ended.returncode == 2
    assert "No space left on device" in one_line(ended.stderr)


@pytest.mark.parametrize("arguments", [["--help"], ["settings"], ["settings", "--json"]])
def test_a_full_disk_behind_standard_output_is_said(arguments: list[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        ended = flowreel(*arguments, stdout=full)
    finally:
        os.close(full)
    assert ended.returncode == 2
    assert "standard output could not be written: no space left" in one_line(ended.stderr)


def test_a_reader_that_goes_away_is_said() -> None:
    with subprocess.Popen(
        [*PYTHON, "settings"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "its reader closed it" in one_line(process.stderr.read())
        assert process.wait(60) == 141


def test_a_standard_output_that_is_closed_from_the_start_is_none() -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&-', *PYTHON, "settings", "serve"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", **PLAIN}, {"PYTHONIOENCODING": "latin-1"}],
    ids=lambda e: "-".join(e.values()),
)
def test_an_output_without_our_characters_spells_them(environment: dict[str, str]) -> None:
    ended = flowreel("--help", environment=environment)
    assert ended.returncode == 0, ended.stderr
    assert "shards -> latents" in " ".join(ended.stdout.split())
    ended = flowreel("sample", "--help", environment=environment)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", **PLAIN}],
)
@pytest.mark.slow
def test_a_whole_command_works_where_nothing_is_utf_8(
    model_dir: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    video = tmp_path / "a.mp4"
    arguments = (str(model_dir), "--prompt", "ein roter Kreis – σ", "--out", str(video))
    ended = flowreel("sample", *arguments, environment=environment)
    assert ended.returncode == 0, ended.stderr
    arguments = (str(model_dir), str(video), "--prompt", "x", "--draws", "2")
    ended = flowreel("likelihood", *arguments, environment=environment)
    assert ended.returncode == 0, ended.stderr
    assert "1/2 + ln sigma" in ended.stdout
    assert "+-" in ended.stdout


def test_a_file_name_that_is_no_text_is_said() -> None:
    ended = subprocess.run(
        [*PYTHON, "inspect", b"no-\xff-data"], capture_output=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 2
    assert b"no-?-data: no such folder" in ended.stderr


def test_the_report_is_written_in_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.report import write_report, Sample\n"
        "from pipeline.recipes import load_recipe\nimport numpy as np\n"
        "from media.write import encode_mp4\n"
        "frames = np.zeros((5, 32, 32, 3), dtype=np.uint8)\n"
        f"out = Path({str(tmp_path)!r}); path = out / 'a.mp4'\n"
        "path.write_bytes(encode_mp4(frames, fps=8.0)); load_recipe('tiny')\n"
        "names = ['held_out_nats_per_dim', 'gaussian_nats_per_dim', 'noise_floor_nats_per_dim',\n"
        "  'shuffled_caption_nats_per_dim', 'codec_psnr_db', 'overlap_s', 'wall_s',\n"
        "  *(f'{word}_{of}' for word in ('colour', 'shape', 'size', 'motion')\n"
        "    for of in ('accuracy', 'after_codec', 'chance'))]\n"
        "summary = {**dict.fromkeys(names, 0.5), 'stage_s': {'train': 1.0}}\n"
        "history = [{'step': 0, 'mode': 'video', 'loss_nats_per_dim': 0.1}]\n"
        "write_report(out, title='σ', summary=summary, history=history, spans=[],\n"
        "  samples=[Sample('½', 'text to video', path, frames)], statuses={'kept': 1})\n"
    )
    environment = {**os.environ, "LC_ALL": "C", **PLAIN, "PYTHONIOENCODING": "utf-8"}
    script = tmp_path / "make_report.py"
    script.write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True, cwd=ROOT,
                   env={**environment, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert "½" in (tmp_path / "report.html").read_text(encoding="utf-8")
