"""`flowreel train --start-from`: what it names is looked at before Ray is started."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from flow.codec import VideoCodec
from pipeline.cli import app
from tests.places import TINY_CODEC
from tests.training.world import write_dataset


def test_a_start_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", clips=2, images=2)
    info = json.loads((data / "dataset.json").read_text())
    info["codec_digest"] = VideoCodec.load(TINY_CODEC).digest
    (data / "dataset.json").write_text(json.dumps(info))
    settings = [
        f"--set={setting}"
        for setting in ("model.latent_channels=4", "prepare.bucket={}", "codec=tiny")
    ]
    place = tmp_path / "no where: #1"
    command = ["train", "--data", data, "--out", tmp_path / "out", "--start-from", place, *settings]
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert f"{place} is no folder: give a model folder" in line
    assert not (tmp_path / "out").exists()
