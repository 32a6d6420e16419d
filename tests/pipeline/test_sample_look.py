"""`flowreel look` as a user meets it: one command says why a clip was dropped."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.samples import write_shard
from media.write import decode_image
from tests.data_prep.bad_media import moving, video
from tests.media import odd_videos as odd
from tests.pipeline.command import PYTHON, flowreel, modules_after, refused
from tests.places import ROOT


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip that is kept, one that is dropped, one that is none, and a shard."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "good.mp4").write_bytes(odd.video())
    (folder / "good.txt").write_text("Four fields.")
    (folder / "interlaced.mp4").write_bytes(odd.interlaced())
    (folder / "list.mp4").write_bytes(b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n")
    names = [f"clip_{number:02}" for number in range(30)]
    write_shard(
        folder / "0.tar", [{"__key__": n, "mp4": video(moving(9)), "txt": n} for n in names]
    )
    return folder


def in_folder(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a working folder."""
    return subprocess.run(
        [*PYTHON, "look", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_dropped_clip_says_why_and_which_setting_keeps_it(clips: Path, tmp_path: Path) -> None:
    source = str(clips / "interlaced.mp4")
    ended = in_folder(tmp_path, source)
    assert ended.returncode == 0, "the look succeeded"
    assert not ended.stderr
    assert "dropped: interlaced" in ended.stdout
    assert "--set prepare.filters.progressive=false" in " ".join(ended.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["look-interlaced.png"]
    assert decode_image((tmp_path / "look-interlaced.png").read_bytes()).shape[1] == 1200
    kept = in_folder(tmp_path, source, "--set", "prepare.filters.progressive=false", "--json")
    # 25 frames at 25 a second: the recipe's window is longer.
    assert json.loads(kept.stdout)["reason"] == "too_short"


def test_json_has_the_outcome_alone_and_frames_are_those_of_the_window(
    clips: Path, tmp_path: Path
) -> None:
    size = ("--set", "prepare.bucket.height=128", "--set", "prepare.bucket.width=128")
    several = ("--set", "prepare.bucket.num_frames=9", "--set", "prepare.windows_per_clip=3")
    out = str(tmp_path / "out.npy")
    ended = in_folder(tmp_path, str(clips / "good.mp4"), "--json", "--frames", out, *size, *several)
    assert ended.returncode == 0
    look = json.loads(ended.stdout)
    assert (look["status"], look["reason"], look["reader"]) == ("kept", "", "pyav")
    assert look["caption"] == "Four fields."
    assert look["facts"]["codec"] == "h264"
    assert look["sheet"] is None
    assert len(look["windows"]) == len(look["frames"]) == 3
    assert look["window"] == look["windows"][0]["window"]
    assert look["pts_s"] == look["windows"][0]["pts_s"]
    for window, path in zip(look["windows"], look["frames"], strict=True):
        frames = np.load(path)
        assert frames.dtype == np.uint8
        assert list(frames.shape) == window["shape"] == [9, 128, 128, 3]
        assert [odd.number_in(frame) for frame in frames] == window["window"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out-1.npy", "out-2.npy", "out.npy"]


def test_of_what_cannot_be_shown_nothing_is_written(clips: Path, tmp_path: Path) -> None:
    ended = in_folder(tmp_path, str(clips / "list.mp4"), "--frames", "frames.npy")
    assert ended.returncode == 0
    assert "failed: names_other_files" in ended.stdout
    assert "frames.npy is not written" in ended.stdout
    assert "no frame can be shown" in in_folder(tmp_path, str(clips / "list.mp4")).stdout
    assert not list(tmp_path.iterdir())


def test_a_shard_lists_its_keys_and_shows_one(clips: Path, tmp_path: Path) -> None:
    source = str(clips / "0.tar")
    listed = in_folder(tmp_path, source).stdout
    assert "30 samples" in listed
    assert "clip_19" in listed
    assert "clip_20" not in listed
    assert "and 10 more" in listed
    assert f"flowreel look {source} clip_00" in listed
    every = json.loads(in_folder(tmp_path, source, "--json").stdout)
    assert [sample["key"] for sample in every["samples"]] == [f"clip_{n:02}" for n in range(30)]
    one = json.loads(in_folder(tmp_path, source, "clip_07", "--json").stdout)
    assert (one["key"], one["number"], one["reason"]) == ("clip_07", 7, "too_short")


def test_what_is_no_input_is_one_line(clips: Path) -> None:
    assert "no such file" in refused("look", "no.mp4")
    assert "did you mean 'clip_07'" in refused("look", str(clips / "0.tar"), "clip07")
    assert "leave the key out" in refused("look", str(clips / "good.mp4"), "good")
    assert "no ordinary file" in refused("look", "/dev/null")
    assert "must end in .png" in refused("look", str(clips / "good.mp4"), "--out", "a.jpg")
    assert "must end in .npy" in refused("look", str(clips / "good.mp4"), "--frames", "a.bin")
    junk = clips / "junk.tar"
    junk.write_bytes(b"junk" * 999)
    assert "not a readable tar" in refused("look", str(junk))


def test_a_look_loads_neither_torch_nor_ray(clips: Path) -> None:
    code, modules, _ = modules_after("look", str(clips / "good.mp4"), "--json")
    assert code == 0
    assert not {"torch", "ray", "diffusers", "transformers", "mlflow", "matplotlib"} & modules


def test_a_sheet_goes_where_it_is_asked_for(clips: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    ended = flowreel("look", str(clips / "good.mp4"), "--out", str(sheet), "--json")
    assert json.loads(ended.stdout)["sheet"] == str(sheet)
    assert sheet.is_file()
