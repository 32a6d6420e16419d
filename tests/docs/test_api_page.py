"""`docs/api.md` describes the whole public API as it is, and its examples run."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import flowreel
from tests.docs.code import rows, section
from tests.places import ROOT
from tests.serving.conftest import model_dir
from tests.training.world import write_dataset

__all__ = ["model_dir"]  # the tiny model folder of the service's tests

PAGE = ROOT / "docs" / "api.md"
NAMES = sorted(set(flowreel.__all__) - {"__version__"})


def blocks(kind: str, text: str | None = None) -> list[str]:
    """Fenced blocks of one kind, such as `python run`."""
    text = PAGE.read_text() if text is None else text
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def signatures(name: str) -> list[ast.FunctionDef]:
    trees = [ast.parse(block).body[0] for block in blocks("python signature", section(PAGE, name))]
    return [tree for tree in trees if isinstance(tree, ast.FunctionDef)]


def stated(tree: ast.FunctionDef) -> list[tuple[str, bool, Any]]:
    """(name, by keyword only, default) of every parameter; no default is `inspect`'s empty."""
    arguments = tree.args
    missing = [None] * (len(arguments.args) - len(arguments.defaults))
    pairs = [*zip(arguments.args, [*missing, *arguments.defaults], strict=True)]
    both = [(arg, value, False) for arg, value in pairs]
    both += [(a, v, True) for a, v in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    empty = inspect.Parameter.empty
    return [
        (arg.arg, keyword, empty if value is None else ast.literal_eval(value))
        for arg, value, keyword in both
    ]


def real(function: Any) -> list[tuple[str, bool, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind is p.KEYWORD_ONLY, p.default) for p in parameters]


def test_every_public_name_has_an_entry_and_nothing_else_has() -> None:
    entries = re.findall(r"^### (\w+)$", PAGE.read_text(), re.MULTILINE)
    assert sorted(entries) == NAMES
    linked = re.findall(r"\[`(\w+)`\]\(#\w+\)", section(PAGE, "The Python API").split("## A ")[0])
    assert sorted(linked) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_code(name: str) -> None:
    thing = getattr(flowreel, name)
    for tree in signatures(name):
        function = thing if tree.name == name else getattr(thing, tree.name)
        assert stated(tree) == real(function), f"{name}: {tree.name}"
        returned = inspect.signature(function).return_annotation
        if tree.returns is not None:
            assert ast.unparse(tree.returns) == returned
    if inspect.isfunction(thing):
        assert signatures(name), f"{name} has no signature"


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_explained(name: str) -> None:
    text = section(PAGE, name)
    for tree in signatures(name):
        if "model" in [arg.arg for arg in tree.args.args] and name in ("sample", "log_prob"):
            continue  # `Model.sample` and `Model.log_prob` explain theirs
        explained = set(re.findall(r"^- (`[^:]+):", text, re.MULTILINE))
        known = {word for line in explained for word in re.findall(r"`(\w+)`", line)}
        for parameter, _, _ in stated(tree):
            assert parameter in {*known, "self"} or f"`{parameter}`" in text, (name, parameter)


@pytest.mark.parametrize("name", ["Model", "Video", "LogProb"])
def test_every_attribute_is_in_the_table_of_its_class(name: str) -> None:
    kind = getattr(flowreel, name)
    listed = {n for row in rows(section(PAGE, name)) for n in re.findall(r"`(\w+)`", row[0])}
    there = {n for n, value in vars(kind).items() if isinstance(value, property)} | {"folder"}
    if name != "Model":
        there = {field.name for field in fields(kind)}
    assert listed == there


def test_blocks_that_are_not_run_are_python() -> None:
    others = blocks("python")
    assert len(others) >= 4
    for block in others:
        compile(block, "api.md", "exec")


def test_every_example_runs(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(model_dir, tmp_path / "runs/demo/train/model")
    write_dataset(tmp_path / "latents")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"flowreel": flowreel}
    for block in blocks("python run"):
        exec(compile(block, "api.md", "exec"), namespace)
    said = capsys.readouterr().out
    for words in ("bits per dimension", "nats", "18 frames cannot be made: counts are 4k+1"):
        assert words in said
    assert (tmp_path / "circle.mp4").stat().st_size > 0
    used = set(re.findall(r"flowreel\.(\w+)", "".join(blocks("python run") + blocks("python"))))
    assert used == set(NAMES) - {"LogProb", "Model", "Recipe", "Video"}
