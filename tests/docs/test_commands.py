"""The commands that the pages tell a reader to type are understood, every option and setting."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import app
from pipeline.recipes import codec_config, load_recipe
from tests.docs.code import pages
from tests.places import ROOT

GROUP: Any = typer.main.get_command(app)
_BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Every line of a page's bash blocks, continued lines joined, as words without comments."""
    for block in _BASH.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line.replace("<this repository>", "URL"), comments=True)


LINES = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
    for page in pages()
    for words in commands(page)
    if words
]


@pytest.mark.parametrize("words", LINES)
def test_a_line_to_type_is_understood(words: list[str]) -> None:
    program, *arguments = words
    if program == "flowreel":
        understood(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
        for extra in arguments[1:]:
            name, _, value = extra.partition("=")
            assert name in ("ARGS", "GPU", "PYTHON")
            if name == "ARGS":
                understood([arguments[0], *shlex.split(value)])
    elif words[:2] == ["python", "-m"]:
        place = ROOT / words[2].replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
    else:
        assert program in ("git", "curl", "mlflow", "ray", "pip"), f"unknown program {program!r}"


def understood(arguments: list[str]) -> None:
    """Parse a command of ours, and hold its settings against the schema."""
    command = GROUP.commands[arguments[0]]
    # Parses and checks, and does not call the command.
    context = command.make_context(arguments[0], list(arguments[1:]))
    settings = context.params.get("set_") or []
    if arguments[0] == "train-codec":
        codec_config(settings)
    elif settings:
        load_recipe(context.params.get("recipe") or "tiny", settings)


SETTINGS = [
    pytest.param(setting, id=f"{page.name}: {setting}")
    for page in pages()
    for setting in re.findall(r"`--set ([\w.]+=[^`\s]+)`", page.read_text())
    if not setting.startswith("key.path")
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_in_the_text_is_one(setting: str) -> None:
    load_recipe("tiny", shlex.split(setting))


def test_options_in_the_text_belong_to_some_command() -> None:
    known = {
        option
        for command in GROUP.commands.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help", "--set", "--version"}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    for page in pages():
        for code in re.findall(r"`(?:flowreel [\w-]+ )?(--[\w-]+)[^`]*`", page.read_text()):
            assert code in known, f"{page.name}: no command has {code}"


def test_every_command_is_in_the_table_of_operations() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    table = set(re.findall(r"`flowreel ([\w-]+)`", text.split("## Settings")[0]))
    hidden = {name for name, command in GROUP.commands.items() if command.hidden}
    assert table == set(GROUP.commands) - hidden
