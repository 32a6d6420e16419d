"""Which shards a user means: a folder, a tar, a `{00000..00099}.tar` range, or a list file. Opens none of them."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.shards import ShardError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000


def find_shards(source: str) -> list[str]:
    """The shards that `source` names, in order.

    Args:
        source: a folder (its `*.tar`, sorted), a tar or URI, a range such as `s3://b/{00000..00099}.tar`, or a `.txt` file with one
            of these per line.

    Raises:
        ShardError: nothing is there, or the range is empty or huge.

    >>> find_shards("s3://bucket/{08..10}.tar")
    ['s3://bucket/08.tar', 's3://bucket/09.tar', 's3://bucket/10.tar']
    """
    if match := _RANGE.search(source):
        return _expand(source, match)
    path = Path(source)
    if path.is_dir():
        found = sorted(str(p) for p in path.glob("*.tar"))
        if not found:
            raise ShardError(f"no *.tar in {path}; give a folder of WebDataset shards")
        return found
    if path.suffix == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text().splitlines()]
        return [
            shard
            for line in lines
            if line and not line.startswith("#")
            for shard in find_shards(line)
        ]
    if "://" not in source and not path.is_file():
        raise ShardError(
            f"no shards at {source!r}: give a folder, a .tar, a {{00000..00099}}.tar range or a .txt list"
        )
    return [source]


def _expand(source: str, match: re.Match[str]) -> list[str]:
    first, last = match.groups()
    count = int(last) - int(first) + 1
    if not 0 < count <= MAX_SHARDS:
        raise ShardError(
            f"range {match.group()} names {count} shards; allowed: 1 to {MAX_SHARDS}, low..high"
        )
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [source[: match.start()] + number + source[match.end() :] for number in numbers]
