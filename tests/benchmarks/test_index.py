"""The benchmark of the index: its bars, and a small run of it."""

from __future__ import annotations

import pytest

from benchmarks.index import main, verdicts


def test_the_bars_are_held_against_what_one_process_took() -> None:
    said = verdicts({"seconds": 1.5, "peak_bytes": 99e6})
    assert [holds for _, holds in said] == [False, True]
    assert "1.500 s" in said[0][0]
    assert "99.0 MB" in said[1][0]


def test_a_small_run_says_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows", "2001", "--shards", "4", "--ranks", "2"])
    said = capsys.readouterr().out
    assert "2001 records of 4 shards" in said
    assert "2 ranks that went through all ids" in said
    assert "memory rose by" in said
