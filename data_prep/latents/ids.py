"""Ids of records as a sequence of texts that are made when they are asked for.

Knows nothing of files or of where a record lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

_PART = 4096
_SHOWN = 10

Rows = npt.NDArray[np.integer[Any]]


class Names(Protocol):
    """What knows the id of a record by its number."""

    def names(self, rows: Rows) -> list[str]:
        """The ids `SHARD/KEY/WINDOW` of these records."""


class Ids(Sequence[str]):
    """Ids of some records, held as their numbers: 4 bytes a record, or none where they are mapped.

    It equals every sequence of the same texts in the same order. A slice is such a sequence too.

    >>> class Letters:
    ...     def names(self, rows):
    ...         return ["abc"[row] for row in rows]
    >>> ids = Ids(Letters(), np.array([2, 0, 1]))
    >>> ids, ids[0], ids[1:], ids == ["c", "a", "b"]
    (['c', 'a', 'b'], 'c', ['a', 'b'], True)

    Args:
        names: what knows the ids.
        rows: [N] numbers of the records, in order.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, names: Names, rows: Rows) -> None:
        self._names = names
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Ids: ...
    def __getitem__(self, at: int | slice) -> str | Ids:
        if isinstance(at, slice):
            return Ids(self._names, self.rows[at])
        return self._names.names(np.array([self.rows[at]]))[0]

    def take(self, places: Rows) -> list[str]:
        """The ids at these places."""
        return self._names.names(self.rows[places])

    def __iter__(self) -> Iterator[str]:
        for part in self.parts():
            yield from part

    def parts(self, size: int = _PART) -> Iterator[list[str]]:
        """All ids, so many at a time."""
        for start in range(0, len(self.rows), size):
            yield self._names.names(self.rows[start : start + size])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        if len(self) <= _SHOWN:
            return repr(list(self))
        return f"<{len(self)} ids from {self[0]!r} to {self[-1]!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Numbers mean something beside their index only.
        return list, (list(self),)
