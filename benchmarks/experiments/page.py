"""What all experiments have in common: the model, tables, plots, and the measured part of a page.

Knows model folders and pages. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowreel.files import write_whole
from pipeline.recipes import Recipe, load_recipe
from pipeline.shipped import recipe_beside, shipped_model
from serving.loading import LoadedModel, load

PAGES = Path(__file__).resolve().parents[2] / "docs" / "experiments"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
SEED = 3_000
"""Of prompts and noise in every experiment: none that guidance was tuned on."""


class PageError(ValueError):
    """A page that has no place for what was measured."""


@dataclass(frozen=True)
class Subject:
    """The model that is experimented on, and the recipe that made it."""

    loaded: LoadedModel
    recipe: Recipe
    folder: Path

    @property
    def guidance(self) -> float:
        """What the recipe serves with."""
        return self.recipe.serve.limits.default_guidance


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown.

    >>> print(table(["a", "b"], [[1, "x"]]))
    | a | b |
    | --- | --- |
    | 1 | x |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def put_measured(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page; words around them stay.

    Raises:
        PageError: the page lacks a mark.
    """
    whole = page.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        raise PageError(f"{page} needs one line {BEGIN} and, after it, one line {END}")
    before, rest = whole.split(BEGIN)
    after = rest.split(END)[1]
    write_whole(page, f"{before}{BEGIN}\n{text.strip()}\n{END}{after}")


def save_plot(figure: Any, name: str, pages: Path) -> str:
    """Write a matplotlib figure beside the page; returns the line of Markdown that shows it."""
    from matplotlib import pyplot

    figure.savefig(pages / f"{name}.png", dpi=110)
    pyplot.close(figure)
    return f"![{name}]({name}.png)"


def run(experiment: Callable[[Subject, Path], str], name: str, words: str) -> None:
    """Parse the arguments, do the experiment, and put its text into its page."""
    parser = argparse.ArgumentParser(description=words.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder; default: the weights that ship")
    parser.add_argument("--pages", type=Path, default=PAGES, help="where the page lies")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(arguments.threads)
    folder = arguments.model or shipped_model()
    recipe = load_recipe(recipe_beside(folder))
    subject = Subject(load(folder, sampling=recipe.sampler), recipe, folder)
    begun, cpu = time.monotonic(), time.process_time()
    text = experiment(subject, arguments.pages)
    took = f"{time.monotonic() - begun:.0f} s, {time.process_time() - cpu:.0f} s of one CPU"
    on = f"{platform.machine()}, {arguments.threads} thread(s), torch {torch.__version__}"
    text += f"\n\n`python -m benchmarks.experiments.{name}`: {took} ({on}); seed {SEED}."
    put_measured(arguments.pages / f"{name}.md", text)
    print(text)
