"""How far a long work is: what its `progress` argument is called with. Knows nothing of bars."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""progress(count, total): how many of the samples or records are written, and how many in all."""

RunProgress = Callable[[str, int, int | None], None]
"""progress(unit, count, total): how many units are finished, and how many in all.

`unit` is "samples" (total is None: it is not known before all shards are read) or "shards".
"""
