"""Which shards a user means."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.inputs import find_shards
from data_prep.shards import ShardError


def test_a_folder_means_its_tars_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "notes.txt"):
        (tmp_path / name).touch()
    assert find_shards(str(tmp_path)) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]


def test_a_range_keeps_its_zeros() -> None:
    assert find_shards("s3://b/{098..101}.tar")[1:3] == ["s3://b/099.tar", "s3://b/100.tar"]


def test_a_list_file_may_hold_ranges_and_comments(tmp_path: Path) -> None:
    listing = tmp_path / "shards.txt"
    listing.write_text("# mine\ns3://b/{0..1}.tar\n\n")
    assert find_shards(str(listing)) == ["s3://b/0.tar", "s3://b/1.tar"]


@pytest.mark.parametrize("source", ["nowhere", "{9..3}.tar", "{0..99999999}.tar"])
def test_what_names_nothing_is_refused(source: str) -> None:
    with pytest.raises(ShardError):
        find_shards(source)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="WebDataset"):
        find_shards(str(tmp_path))
