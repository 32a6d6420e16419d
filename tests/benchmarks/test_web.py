"""The ways of reading over HTTP that are compared read the same bytes, or there is no figure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import web


def test_every_way_has_a_figure_and_the_bare_loop_is_one() -> None:
    with web.served(3 * 2**20) as uri:
        lines = web.measure(uri, turns=1)
        assert web.read_all(web.ours, uri).size_bytes == 3 * 2**20
    assert [line.split("  ")[0] for line in lines] == ["bare httpx", "ours", "fsspec"]
    assert " 1.00 " in lines[0]


def test_a_way_that_reads_other_bytes_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(uri: str) -> Iterator[bytes]:
        yield next(web.ours(uri))

    monkeypatch.setitem(web.WAYS, "ours", cut)
    with web.served(3 * 2**20) as uri, pytest.raises(AssertionError, match="other bytes came"):
        web.measure(uri, turns=1)
