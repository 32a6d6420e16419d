"""Every page: its links lead somewhere, and the files and names it points at are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.code import anchors, names_in, pages, places, prose, relative_links
from tests.places import ROOT

PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)


@PAGES
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in relative_links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {file}, which is not there"
        assert ROOT in target.parents, f"{page.name} links to {file}, outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


@PAGES
def test_files_and_names_are_there(page: Path) -> None:
    for file, name in places(page):
        path = ROOT / file
        assert path.exists(), f"{page.name} names {file}, which is not there"
        if name is not None:
            assert name in names_in(path), f"{page.name}: {file} has no {name}"


@PAGES
def test_prose_is_wrapped(page: Path) -> None:
    long = [
        line
        for line in prose(page).splitlines()
        if len(line) > 130 and not line.startswith(("|", "!", "[")) and "](" not in line
    ]
    assert not long, f"{page.name}: {long[0]}"


@PAGES
def test_the_project_speaks_of_itself_alone(page: Path) -> None:
    text = page.read_text()
    for word in ("/work/", "/tmp/", "DESIGN.md", "HOUSE.md"):
        assert word not in text, f"{page.name} speaks of {word}"
