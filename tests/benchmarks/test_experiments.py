"""The pages of experiments: figures go between the marks, and small runs say what they measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.experiments import denoisers, jacobi, motions
from benchmarks.experiments.page import (
    BEGIN,
    END,
    PAGES,
    PageError,
    Subject,
    put_measured,
)
from pipeline.recipes import load_recipe
from pipeline.shipped import SHIPPED_MODEL, recipe_beside
from serving.loading import load

NAMES = ("denoisers", "jacobi", "motions")


@pytest.fixture(scope="module")
def subject() -> Subject:
    recipe = load_recipe(recipe_beside(SHIPPED_MODEL))
    return Subject(load(SHIPPED_MODEL, sampling=recipe.sampler), recipe, SHIPPED_MODEL)


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows, its head left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_words_around_the_marks_stay(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_measured(page, "new\n")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(PageError, match="needs one line"):
        put_measured(page, "new")


@pytest.mark.parametrize("name", NAMES)
def test_every_page_holds_figures_a_plot_its_command_and_what_surprised(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    measured = text.split(BEGIN)[1].split(END)[0]
    assert f"python -m benchmarks.experiments.{name}" in measured
    assert len(rows(measured)) >= 3
    assert (PAGES / f"{name}.png").is_file()
    surprised = text.split("## What surprised")[1]
    assert len(surprised.split()) > 20
    assert f"[{name}]({name}.md)" in (PAGES / "index.md").read_text()


def test_smaller_thresholds_are_more_exact(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jacobi, "VIDEOS", 1)
    monkeypatch.setattr(jacobi, "BLOCKS", (8,))
    monkeypatch.setattr(jacobi, "THRESHOLDS", (1e-1, 1e-5))
    found = {row[0]: float(row[3]) for row in rows(jacobi.experiment(subject, tmp_path))}
    assert found["sequential"] == 0
    assert 0 < found["8 tokens, 1e-05"] < found["8 tokens, 1e-01"]
    assert (tmp_path / "jacobi.png").is_file()


@pytest.mark.slow
def test_denoising_gives_back_more_than_the_decoder_alone(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoisers, "CLIPS", 4)
    found = {row[0]: row[1] for row in rows(denoisers.experiment(subject, tmp_path))}
    psnr_db = {name: float(value) for name, value in found.items() if value}
    assert psnr_db["the codec, no noise"] == max(psnr_db.values())
    assert psnr_db["score (Tweedie)"] > psnr_db["the decoder alone"]


@pytest.mark.slow
def test_every_motion_has_a_row(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(motions, "PROMPTS", 1)
    text = motions.experiment(subject, tmp_path)
    assert [row[0] for row in rows(text)] == list(subject.recipe.world.kinds.motions)
    assert re.search(r"1 prompts a motion", text)
