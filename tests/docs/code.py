"""What a page of the documentation says of the code, checked without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tests.places import ROOT

PACKAGES = (
    "flowreel", "flow", "media", "data_prep", "training", "serving", "pipeline", "benchmarks",
    "tests", "docs",
)  # fmt: skip
_CODE = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_PLACE = re.compile(rf"((?:{'|'.join(PACKAGES)})/[\w./-]*)(?::([\w.]+))?")


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def places(page: Path) -> Iterator[tuple[str, str | None]]:
    """(file or folder, name in it or None) of every place that a page names in backticks."""
    for code in _CODE.findall(prose(page)):
        if match := _PLACE.fullmatch(code):
            yield match[1], match[2]


@lru_cache(maxsize=256)
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, methods (as CLASS.METHOD) and constants of a Python file."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                names.add(node.name)
            case ast.ClassDef():
                names.add(node.name)
                inside = (ast.FunctionDef, ast.AsyncFunctionDef)
                names |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, inside)}
            case ast.Assign():
                names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return frozenset(names)


def section(page: Path, title: str) -> str:
    """The text under a heading, up to the next heading of its own or a higher level."""
    text = page.read_text()
    match = re.search(rf"^(#+) {re.escape(title)}\s*$", text, re.MULTILINE)
    assert match, f"{page.name} has no section {title!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of every line of every table in a text, without headings and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {i for i, row in enumerate(cells) if all(re.fullmatch(r":?-+:?", c) for c in row)}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def relative_links(page: Path) -> Iterator[tuple[str, str]]:
    """(file or "", anchor or "") of every link of a page that stays in the repository."""
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def pages() -> list[Path]:
    """The README and every page of `docs/`."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
