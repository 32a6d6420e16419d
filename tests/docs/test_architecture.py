"""`docs/architecture.md` is the map of this code and of no other."""

from __future__ import annotations

import re

import pytest

from tests.docs.code import names_in, rows, section
from tests.places import ROOT
from tests.test_import_rules import MAY_IMPORT, OURS

PAGE = ROOT / "docs" / "architecture.md"
WALKS = ("clip", "latent", "prompt", "request")
FILES = [(file.strip("`"), int(lines)) for file, lines, _ in rows(section(PAGE, "Reading order"))]


def test_the_table_of_imports_is_the_rule_that_is_held() -> None:
    table = {
        package.strip("`"): set(re.findall(r"`([\w.]+)`", allowed)) or allowed
        for package, allowed in rows(section(PAGE, "Who may import whom"))
    }
    expected: dict[str, object] = {}
    for package, allowed in MAY_IMPORT.items():
        others = set(allowed) - {package}
        expected[package] = "all" if set(allowed) == set(OURS) else others or "nothing"
    assert table == expected


@pytest.mark.parametrize("walk", WALKS)
def test_each_walk_is_a_numbered_list_of_places(walk: str) -> None:
    hops = re.findall(r"^(\d+)\. (.+(?:\n   .+)*)", section(PAGE, f"The walk of a {walk}"), re.M)
    assert [int(number) for number, _ in hops] == [*range(1, len(hops) + 1)]
    assert 10 <= len(hops) <= 18
    for _, hop in hops:
        assert re.match(r"`[\w/]+\.py:[\w.]+`", hop), f"{hop!r} begins with no `file.py:name`"


@pytest.mark.parametrize(("file", "lines"), FILES, ids=[file for file, _ in FILES])
def test_line_counts_are_about_right(file: str, lines: int) -> None:
    there = len((ROOT / file).read_text().splitlines())
    assert abs(there - lines) <= 0.2 * there, f"{file} has {there} lines, the page says {lines}"


def test_the_reading_order_can_be_read_in_an_afternoon() -> None:
    assert 14 <= len(FILES) <= 18
    assert FILES[0][0] == "pipeline/stages.py"


def test_questions_are_answered_by_places_that_exist() -> None:
    questions = rows(section(PAGE, "In one minute"))
    for wanted in ("clip decoded", "token inverted", "job stored", "may I change"):
        (answer,) = [row[1] for row in questions if wanted in row[0]]
        assert "`" in answer or "](#" in answer
    assert "JobStore" in names_in(ROOT / "serving/job_store.py")
