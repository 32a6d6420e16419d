"""What docstrings say of their files is true, and packages open with a map of their files."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.claims import UNCHECKED, VOCABULARY, claims_of, imports_of, sign_of, signs_in
from tests.places import ROOT
from tests.test_import_rules import FILES, OURS

DOCSTRINGS = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in FILES}
CLAIMS = {path: claims_of(docstring) for path, docstring in DOCSTRINGS.items()}
STANDARD_LIBRARY_ONLY = [
    path for path in FILES if "tandard library only" in " ".join(DOCSTRINGS[path].split())
]
PACKAGES = sorted({path.parent for path in FILES})
MAP_LINE = re.compile(r"^[ ]{2,}(?P<name>\w+)(?P<kind>\.py|/)(?:\s|$)", flags=re.MULTILINE)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in FILES if CLAIMS[path]], ids=_name)
def test_a_file_does_not_import_what_it_knows_nothing_of(path: Path) -> None:
    tree = ast.parse(path.read_text())
    false = {
        claim: signs
        for claim in CLAIMS[path]
        if (sign := sign_of(claim)) and (signs := list(signs_in(tree, sign)))
    }
    assert not false, f"{_name(path)} says that it knows nothing of what it uses: {false}"


def test_every_claim_can_be_held_against_imports_or_is_known_not_to_be() -> None:
    unknown = {
        _name(path): missing
        for path, claims in CLAIMS.items()
        if (missing := [claim for claim in claims if not (claim in UNCHECKED or sign_of(claim))])
    }
    assert not unknown, f"put these words into tests/claims.py, VOCABULARY or UNCHECKED: {unknown}"


@pytest.mark.parametrize("path", STANDARD_LIBRARY_ONLY, ids=_name)
def test_standard_library_only_is_true_where_it_is_said(path: Path) -> None:
    imported = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()))}
    foreign = imported - {*sys.stdlib_module_names, *OURS}
    assert not foreign, f"{_name(path)} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_file_says_what_it_is(path: Path) -> None:
    assert DOCSTRINGS[path], f"{_name(path)} has no docstring"


@pytest.mark.parametrize("package", PACKAGES, ids=_name)
def test_a_package_opens_with_a_map_of_all_that_is_in_it(package: Path) -> None:
    """A line a file, as `    name.py   what it does`; a line a folder, as `    name/   …`.

    Or the file's name in backticks, in a sentence of the docstring.
    """
    docstring = DOCSTRINGS.get(package / "__init__.py", "")
    lines = {match["name"] + match["kind"] for match in MAP_LINE.finditer(docstring)}
    named = set(re.findall(r"`(\w+\.py)`", docstring))
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    missing, gone = sorted(there - lines - named), sorted(lines - there)
    assert not missing, f"the map of {_name(package)} does not name {missing}"
    assert not gone, f"the map of {_name(package)} names what is not there: {gone}"


def test_a_false_claim_is_seen() -> None:
    tree = ast.parse("import ray.data\nfrom pathlib import Path\nPath('a').read_text()\n")
    assert list(signs_in(tree, VOCABULARY["ray"])) == ["imports ray.data"]
    assert list(signs_in(tree, VOCABULARY["files"])) == ["calls read_text in line 3"]
    assert not list(signs_in(tree, VOCABULARY["torch"]))
