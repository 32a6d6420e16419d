"""Recipes: what is wrong is said in one line that names key, value and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowreel.values import digest_of
from pipeline.recipes import RecipeError, load_recipe, recipe_names, save_recipe
from tests.places import ROOT
from tests.training.world import CHANNELS, write_dataset
from training.stated_video import StatedVideo


def refusal(tmp_path: Path, text: str, overrides: list[str] | None = None) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tiny_text() -> str:
    import pipeline.recipes

    return (pipeline.recipes.RECIPES / "tiny.yaml").read_text()


def test_a_captioner_is_a_name_or_a_section(tmp_path: Path) -> None:
    default = load_recipe("tiny").prepare
    path = tmp_path / "recipe.yaml"
    section = "captioner: {backend: auto}"
    assert section in tiny_text()
    path.write_text(tiny_text().replace(section, "captioner: auto"))
    assert load_recipe(str(path)).prepare == default
    digest = digest_of({"captioner": "auto", "caption_version": 1, "fps": default.bucket.fps})
    assert default.caption_digest() == digest
    chosen = ["prepare.captioner.backend=vlm", "prepare.captioner.model=owner/name"]
    assert load_recipe("tiny", chosen).prepare.captioner.model == "owner/name"
    message = refusal(tmp_path, tiny_text(), ["prepare.captioner.backend=vlm"])
    assert "needs captioner.model" in message
    message = refusal(tmp_path, tiny_text(), ["prepare.captioner.bakend=vlm"])
    assert "did you mean backend?" in message


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_by_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_an_unknown_key_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    message = refusal(tmp_path, tiny_text(), ["train.stepz=5"])
    assert "train.stepz = 5" in message
    assert "unknown key" in message
    assert "did you mean steps?" in message
    assert "optimizer, checkpoints" in message


def test_a_key_that_belongs_in_a_section_inside_is_shown_there(tmp_path: Path) -> None:
    message = refusal(tmp_path, tiny_text(), ["train.batch_size=8"])
    assert "did you mean train.batches.batch_size?" in message
    message = refusal(tmp_path, tiny_text(), ["train.batches.batch_sise=8"])
    assert "did you mean batch_size?" in message


def test_an_unknown_key_of_the_model_is_named_too(tmp_path: Path) -> None:
    message = refusal(tmp_path, tiny_text(), ["model.deep_witdh=64"])
    assert "model.deep_witdh = 64" in message
    assert "did you mean deep_width?" in message


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=0", "train.steps", "0"),
        ("train.steps=many", "train.steps", "'many'"),
        ("prepare.bucket.num_frames=18", "prepare.bucket", "18"),
        ("model.head_dim=30", "model", "30"),
        ("serve.port=70000", "serve.port", "70000"),
        ("text.kind=bert", "text", "bert"),
        ("codec=/no/such/folder", "codec", "'/no/such/folder'"),
        ("world.height=63", "world.height", "63"),
        ("world.kinds.motions=[left,hop]", "world.kinds", "'hop'"),
        ("world.kinds.two_things=2", "world.kinds", "two_things is 2"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(
    tmp_path: Path, override: str, key: str, value: str
) -> None:
    message = refusal(tmp_path, tiny_text(), [override])
    assert key in message
    assert value in message


def without_bucket(tmp_path: Path) -> str:
    """tiny, but for its bucket: a file's path."""
    line = next(line for line in tiny_text().splitlines() if line.strip().startswith("bucket:"))
    path = tmp_path / "open.yaml"
    path.write_text(tiny_text().replace(line, ""))
    return str(path)


def test_a_recipe_states_of_the_videos_what_was_given(tmp_path: Path) -> None:
    assert load_recipe("tiny").stated_video == StatedVideo(17, 64, 64, 8.0)
    path = without_bucket(tmp_path)
    assert load_recipe(path).stated_video == StatedVideo()
    assert load_recipe(path, ["prepare.bucket.height=128"]).stated_video == StatedVideo(height=128)
    aspects = ["prepare.bucket.aspects=['1:1','16:9']"]
    assert load_recipe(path, aspects).stated_video == StatedVideo(sizes=((64, 64), (48, 88)))
    sizes = ["prepare.bucket.sizes=[[48,80]]"]
    assert load_recipe("tiny", sizes).stated_video == StatedVideo(17, fps=8.0, sizes=((48, 80),))


def test_a_written_recipe_states_defaults_only_where_it_prepared(tmp_path: Path) -> None:
    recipe = load_recipe(without_bucket(tmp_path), ["prepare.bucket.fps=16"])
    save_recipe(recipe, tmp_path)
    assert load_recipe(str(tmp_path / "recipe.yaml")).stated_video == StatedVideo(17, 64, 64, 16.0)
    save_recipe(recipe, tmp_path, bucket_as_given=True)
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe
    assert again.stated_video == StatedVideo(fps=16.0)


def test_training_refuses_videos_that_the_dataset_does_not_hold(tmp_path: Path) -> None:
    data, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    command = [
        *(sys.executable, "-m", "pipeline.cli", "train", "--data", str(data), "--out", str(out)),
        *("--recipe", "tiny", "--set", f"model.latent_channels={CHANNELS}"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "prepare.bucket states num_frames 17, but" in line
    assert "9x64x64 (frames x height x width) at 8 fps" in line
    assert "train with --set prepare.bucket.num_frames=9, or prepare them again" in line
    assert not out.exists()


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert "missing" in refusal(tmp_path, "name: x\n")


def test_text_and_model_must_fit(tmp_path: Path) -> None:
    message = refusal(tmp_path, tiny_text(), ["text.length=8"])
    assert "8x64" in message
    assert "24x64" in message


def test_what_is_no_yaml_or_no_file_is_said(tmp_path: Path) -> None:
    assert "not YAML" in refusal(tmp_path, "a: [1")
    assert "map of sections" in refusal(tmp_path, "- 1")
    with pytest.raises(RecipeError, match="no such file, and no recipe of that name"):
        load_recipe("nowhere.yaml")
    with pytest.raises(RecipeError, match=r"key\.path=value"):
        load_recipe("tiny", ["train.steps"])


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", ["train.steps=7"])
    assert recipe.train.steps == 7
    save_recipe(recipe, tmp_path)
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
