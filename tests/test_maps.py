"""The map at the top of every package names each of its files, and nothing that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.places import ROOT

TOP = ("flow", "media", "data_prep", "training", "serving", "pipeline", "flowreel", "benchmarks")
PACKAGES = sorted(path.parent for top in TOP for path in (ROOT / top).rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_opens_with_a_map_of_its_files(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    on_map = re.findall(r"^    (\w+\.py|\w+/)  ", text, re.MULTILINE)
    files = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(on_map) == sorted([*files, *folders])
