"""The tree of errors: as drawn, whole, and unchanged by a journey between processes."""

from __future__ import annotations

import pickle
import re

import pytest

import serving.errors
from flowreel.errors import FlowreelError
from serving.errors import ServingError

ROW = re.compile(r"^    ((?:│   |    )*)[└├]── (\w+) +(\d{3})  (\w+) ", flags=re.MULTILINE)


def tree(kind: type[ServingError], depth: int = 0) -> set[tuple[int, str, int, str]]:
    """(depth, name, status, code) of a class and of all below it."""
    rows = {(depth, kind.__name__, kind.status, kind.code)}
    return rows.union(*(tree(child, depth + 1) for child in kind.__subclasses__()))


def all_kinds(kind: type[ServingError] = ServingError) -> list[type[ServingError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in all_kinds(child))]


def test_the_tree_is_as_drawn() -> None:
    rows = [
        (len(indent) // 4, name, int(status), code)
        for indent, name, status, code in ROW.findall(serving.errors.__doc__ or "")
    ]
    assert len(rows) == len(set(rows))
    assert set(rows) == tree(ServingError)
    assert issubclass(ServingError, FlowreelError)


def test_every_kind_has_a_code_of_its_own_and_says_what_it_is() -> None:
    kinds = all_kinds()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(kind.__doc__ for kind in kinds)


@pytest.mark.parametrize("kind", all_kinds())
def test_errors_survive_pickling(kind: type[ServingError]) -> None:
    error = kind("why", param="seed", retry_after_s=3)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.param, again.retry_after_s) == ("why", "seed", 3)
    assert again.body() == error.body()
