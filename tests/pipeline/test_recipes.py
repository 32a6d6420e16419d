"""Recipes: what is wrong is said in one line that names key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowreel.values import digest_of
from pipeline.recipes import RecipeError, load_recipe, recipe_names, save_recipe


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
    section = "captioner: {backend: measured}"
    assert section in tiny_text()
    path.write_text(tiny_text().replace(section, "captioner: measured"))
    assert load_recipe(str(path)).prepare == default
    assert default.caption_digest() == digest_of({"captioner": "measured", "caption_version": 1})
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
    assert "batch_size" in message


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
    ],
)
def test_a_bad_value_is_named_with_its_rule(
    tmp_path: Path, override: str, key: str, value: str
) -> None:
    message = refusal(tmp_path, tiny_text(), [override])
    assert key in message
    assert value in message


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert "missing" in refusal(tmp_path, "name: x\n")


def test_text_and_model_must_fit(tmp_path: Path) -> None:
    message = refusal(tmp_path, tiny_text(), ["text.length=8"])
    assert "8x64" in message
    assert "16x64" in message


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
