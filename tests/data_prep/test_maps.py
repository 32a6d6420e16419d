"""The map at the top of every package names each of its files, and nothing that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.places import ROOT

PACKAGES = sorted(path.parent for path in (ROOT / "data_prep").rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_a_package_opens_with_a_map_of_its_files(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    on_map = re.findall(r"^    (\w+\.py|\w+/)  ", text, re.MULTILINE)
    files = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    # The story of one sample is named in the first sentence of the first map.
    story = ["stages.py"] if package.name == "data_prep" else []
    assert sorted([*on_map, *story]) == sorted([*files, *folders])
