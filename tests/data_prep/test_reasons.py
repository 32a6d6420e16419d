"""The table of reasons is whole: every code that a sample can end with, and no other."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import media.errors
from data_prep.config import PrepareConfig
from data_prep.reasons import REASONS, remedy_of, setting_value
from pipeline.recipes import load_recipe
from tests.data_prep.test_bad_input import TABLE
from tests.places import ROOT

NEVER_OF_A_SAMPLE = {"media_error", "video_error", "image_error", "bad_frames"}
"""Of classes that are not raised themselves, and of frames that are written."""
DOWNLOADERS = {"failed_to_download"}


def strings(node: ast.AST) -> Iterator[str]:
    """The plain strings that an expression may be; of an f-string, with its values as `*`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(p.value if isinstance(p, ast.Constant) else "*" for p in node.values)
    elif isinstance(node, ast.IfExp):
        yield from strings(node.body)
        yield from strings(node.orelse)


def given_in(path: Path) -> Iterator[str]:
    """Reason codes that a file of data preparation gives to samples."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="Drop"), args=[reason, *_]):
                yield from strings(reason)
            case ast.Call(func=ast.Name(id="decided"), args=[_, _, reason, *_]):
                yield from strings(reason)
            case ast.Assign(targets=[ast.Attribute(attr="problem")], value=value):
                yield from strings(value)
            case ast.ClassDef(name=name) if name.endswith("TooShort"):
                for line in node.body:
                    if isinstance(line, ast.Assign):
                        yield from strings(line.value)


def codes() -> set[str]:
    found = {
        error.reason
        for error in vars(media.errors).values()
        if isinstance(error, type) and issubclass(error, media.errors.MediaError)
    }
    for path in (ROOT / "data_prep").rglob("*.py"):
        found |= set(given_in(path))
    found -= {"", *NEVER_OF_A_SAMPLE}
    return found - {"*_frames"} | {f"{colour}_frames" for colour in ("black", "white")}


def test_every_reason_that_the_code_gives_is_in_the_table_and_no_other() -> None:
    assert codes() == set(REASONS)


def test_every_reason_of_the_page_is_in_the_table() -> None:
    assert {row.reason for row in TABLE.values() if row.reason} <= {*REASONS, *DOWNLOADERS}
    assert "downloader" in remedy_of("failed_to_download").advice


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_names_settings_that_are_there(reason: str) -> None:
    remedy = REASONS[reason]
    for setting in remedy.settings:
        setting_value(PrepareConfig(), setting)
    if remedy.off:
        (setting,) = remedy.settings
        recipe = load_recipe("tiny", [f"prepare.{setting}={remedy.off}"])
        assert json.dumps(setting_value(recipe.prepare, setting)).strip('"') in (
            remedy.off,
            f"{remedy.off}.0",
        )


def test_the_page_says_of_every_reason_what_the_command_says() -> None:
    page = (ROOT / "docs" / "bad_input.md").read_text().split("## Why was my clip dropped?")[1]
    said = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    for reason, remedy in REASONS.items():
        value = f"={remedy.off}" if remedy.off else ""
        settings = ", ".join(f"`prepare.{setting}{value}`" for setting in remedy.settings)
        assert said.pop(reason) == f"{settings or '—'} | {remedy.advice}"
    assert not said
