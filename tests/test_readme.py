"""What the table of the model, in docs/model.md, points at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.places import ROOT

PAGE = (ROOT / "docs" / "model.md").read_text()
ROWS = re.findall(r"^\| [^|]+ \| `([^`]+\.py)` \| (.+) \|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("file", "tests"), ROWS)
def test_every_row_of_the_model_table_names_a_file_and_its_tests(file: str, tests: str) -> None:
    assert (ROOT / file).is_file()
    where = Path()
    for named, test in re.findall(r"`([^`]*)::(\w+)`", tests):
        if named:
            where = ROOT / "tests" / named if "/" in named else ROOT / "tests/flow" / named
        assert f"def {test}(" in where.read_text()


def test_the_table_was_found() -> None:
    assert len(ROWS) > 10
