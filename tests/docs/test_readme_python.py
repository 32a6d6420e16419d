"""The README's Python runs, its claims are those of the log, and it is short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.code import pages
from tests.places import ROOT

README = (ROOT / "README.md").read_text()


def test_the_python_runs_and_says_what_it_promises(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    exact, bits, least = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"exact for noise that is at most \d\S* away", exact)
    assert re.fullmatch(r"-?\d+\.\d{3} ± \d+\.\d{3} bits per dimension", bits)
    assert re.fullmatch(r"the least likely latent frame is number [0-4]", least)
    assert (tmp_path / "circle.mp4").stat().st_size > 0


def test_it_can_be_read_in_five_minutes() -> None:
    assert 500 <= len(README.split()) <= 900


def test_every_folder_of_the_checkout_has_its_line() -> None:
    shown = set(re.findall(r"^(\w+)/  ", README, re.MULTILINE))
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.[pm][yd]"))}
    assert shown == {name for name in there if name[0] != "."} | {"docs"}


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in pages():
        assert page.name == "index.md" or f"{page.name})" in index, f"index.md misses {page.name}"
