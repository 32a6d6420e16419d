"""What the README and the other pages point at exists, and the tests they name can run anywhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SKIPS = re.compile(r"mark\.skip|pytest\.skip|importorskip")


class NamedTest(NamedTuple):
    """A test as a table writes it, `FILE::NAME`; without a folder the file is in `tests/flow/`."""

    page: str
    file: str
    name: str

    def path(self) -> Path:
        places = [ROOT / self.file, ROOT / "tests" / self.file, ROOT / "tests" / "flow" / self.file]
        found = [place for place in places if place.is_file()]
        assert found, f"{self.page} names {self.file}, which is in no folder of tests"
        return found[0]


def _rows(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith("|")]


def _named_tests() -> list[NamedTest]:
    """Every test in a table; `::NAME` alone is in the file named before it in the row."""
    tests = []
    for page in PAGES:
        for row in _rows(page):
            file = ""
            for named, name in re.findall(r"`([^`\s]*)::(test_\w+)`", row):
                file = named or file
                tests.append(NamedTest(page.name, file, name))
    return tests


def _named_files() -> list[tuple[str, str]]:
    """(page, file) of every Python file of ours that a table names with its folder."""
    return [
        (page.name, file)
        for page in PAGES
        for row in _rows(page)
        for file in re.findall(r"`(\w+/[\w/]+\.py)`", row)
    ]


def _links() -> list[tuple[str, str]]:
    """(page, target) of every link to a file of the repository."""
    return [
        (str(page.relative_to(ROOT)), target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not target.startswith("mailto:")
    ]


@pytest.mark.parametrize(("page", "file"), _named_files())
def test_every_file_that_a_table_names_exists(page: str, file: str) -> None:
    assert (ROOT / file).is_file() or (ROOT / "tests" / file).is_file(), f"{page} names {file}"


@pytest.mark.parametrize("test", _named_tests(), ids=lambda test: f"{test.file}::{test.name}")
def test_every_test_that_a_table_names_exists_and_is_never_skipped(test: NamedTest) -> None:
    source = test.path().read_text()
    functions = {
        node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    }
    assert test.name in functions, f"{test.page} names {test.name}, which {test.file} lacks"
    function = functions[test.name]
    lines = [ast.unparse(decorator) for decorator in function.decorator_list]
    text = "\n".join([*lines, ast.get_source_segment(source, function) or ""])
    assert not SKIPS.search(text), f"{test.name} may be skipped: whoever reads {test.page} runs it"
    assert not re.search(r"pytestmark\s*=.*skip", source), f"{test.file} may be skipped whole"


@pytest.mark.parametrize(("page", "target"), _links())
def test_every_link_leads_to_a_file(page: str, target: str) -> None:
    assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_table_of_the_model_was_found() -> None:
    assert len(_named_tests()) > 10
    assert len({file for _, file in _named_files()}) > 10
