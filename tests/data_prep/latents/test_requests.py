"""A store's dataset of many shards is opened, resumed and inspected by as few requests as of few.

Only listings grow, by one page for a thousand names.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_prep.many_shards import requests_of
from tests.data_prep.s3_server import Store


def test_requests_do_not_grow_with_the_shards(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few, many = (requests_of(store, tmp_path / str(count), count) for count in (100, 900))
    assert few == many
    limits = {"open it": 15, "inspect it": 80, "resume it": 15}
    for name, asked in many.items():
        limit = next(limit for begin, limit in limits.items() if name.startswith(begin))
        assert 0 < asked.total() <= limit, name
