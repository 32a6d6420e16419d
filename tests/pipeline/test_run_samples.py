"""Samples of a trained model: the same prompts from the same noise, every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipes import load_recipe
from pipeline.run_samples import SHEET_NAME, first_captions, samples_of
from tests.serving.conftest import model_dir as model_dir
from tests.training.world import write_dataset


@pytest.mark.slow
def test_samples_are_the_same_files_every_time(model_dir: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    recipe = load_recipe("tiny", ["train.tracking.samples=2", "sampler.denoiser=none"])
    look = samples_of(recipe, data)
    assert look is not None
    once, again = (look(model_dir, tmp_path / name) for name in ("once", "again"))
    assert [path.name for path in once] == ["000.mp4", "001.mp4", SHEET_NAME]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    assert once[0].read_bytes() != once[1].read_bytes()


def test_a_recipe_that_wants_no_samples_has_none(tmp_path: Path) -> None:
    for setting in ("train.tracking.samples=0", "train.tracking.enabled=false"):
        asked = ["train.tracking.samples=2", setting]
        assert samples_of(load_recipe("tiny", asked), tmp_path) is None


def test_captions_are_those_of_held_out_clips(tmp_path: Path) -> None:
    held_out = first_captions(write_dataset(tmp_path / "data"), 3)
    assert len(held_out) == 3
    few = write_dataset(tmp_path / "few", clips=2, images=0)
    assert first_captions(few, 3), "of clips trained on where none is held out"
