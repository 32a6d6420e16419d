"""Which input shard is which: what a user's words name, names that tell shards apart, fingerprints of change.

Looks at paths, sizes, times and bytes; knows nothing of what is in a shard.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.locations import file_version, is_uri, shown
from data_prep.shards import ShardError, open_shard
from data_prep.storage import open_folder

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000


def find_shards(source: str) -> list[str]:
    """The shards that `source` names, in order.

    Args:
        source: a folder (its `*.tar`, sorted), a tar or URI, a range such as `s3://b/{00000..00099}.tar`, or a `.txt` file with one
            of these per line.

    Raises:
        ShardError: nothing is there, or the range is empty or huge.
        StorageError: a store that has to be asked fails.

    >>> find_shards("s3://bucket/{08..10}.tar")
    ['s3://bucket/08.tar', 's3://bucket/09.tar', 's3://bucket/10.tar']
    """
    if match := _RANGE.search(source):
        return _expand(source, match)
    if is_uri(source):
        return _in_store(source)
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
    if not path.is_file():
        raise ShardError(
            f"no shards at {source!r}: give a folder, a .tar, a {{00000..00099}}.tar range or a .txt list"
        )
    return [source]


def _in_store(source: str) -> list[str]:
    """A file of a store, or the `*.tar` right below a prefix of it."""
    place, mark, query = source.partition("?")
    if place.endswith((".tar", ".tar.gz", ".tgz")):
        return [source]
    names = [name for name in open_folder(source).names() if name.endswith(".tar")]
    if not names:
        raise ShardError(f"no *.tar in {shown(source)}; give a prefix of WebDataset shards")
    return [f"{place.rstrip('/')}/{name}{mark}{query}" for name in names]


def _expand(source: str, match: re.Match[str]) -> list[str]:
    first, last = match.groups()
    count = int(last) - int(first) + 1
    if not 0 < count <= MAX_SHARDS:
        raise ShardError(
            f"range {match.group()} names {count} shards; allowed: 1 to {MAX_SHARDS}, low..high"
        )
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [source[: match.start()] + number + source[match.end() :] for number in numbers]


def name_shards(sources: Sequence[str]) -> dict[str, str]:
    """Name of each shard → its source; the shortest path endings that tell them apart.

    >>> name_shards(["a/0.tar", "b/0.tar", "b/1.tar"])
    {'a__0': 'a/0.tar', 'b__0': 'b/0.tar', '1': 'b/1.tar'}

    Raises:
        ShardError: no shard, or the same one twice.
    """
    if not sources:
        raise ShardError("no input shards; give at least one tar")
    parts = {source: _stem(source).split("/") for source in sources}
    if len(parts) != len(sources):
        twice = [source for source, count in Counter(sources).items() if count > 1]
        raise ShardError(f"shards given twice: {', '.join(twice)}")
    depth = dict.fromkeys(sources, 1)
    while True:
        names = {source: "__".join(parts[source][-depth[source] :]) for source in sources}
        shared = {name for name, count in Counter(names.values()).items() if count > 1}
        longer = [s for s in sources if names[s] in shared and depth[s] < len(parts[s])]
        if not longer:
            break
        for source in longer:
            depth[source] += 1
    if shared:
        raise ShardError(f"shards that are the same file: {', '.join(sorted(shared))}")
    return {name: source for source, name in names.items()}


def _stem(source: str) -> str:
    path = shown(source).partition("://")[2] or source
    folder, _, base = path.rpartition("/")
    for suffix in (".tar", ".tar.gz", ".tgz"):
        base = base.removesuffix(suffix)
    return f"{folder}/{base}".strip("/") if folder else base


def content_sha256(source: str) -> str:
    """Hex SHA-256 of a shard's content. Raises ShardError where it is not there."""
    digest = hashlib.sha256()
    with open_shard(source) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(source: str) -> str:
    """Size and modification time of a shard, or its etag. Raises ShardError where it is not there."""
    try:
        return file_version(source)
    except FileNotFoundError as error:
        raise ShardError(f"cannot open shard {shown(source)}: no such file") from error
