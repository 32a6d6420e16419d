"""Which input shard is which: names that tell shards apart, and fingerprints that tell them changed.

Looks at paths, sizes, times and bytes; knows nothing of what is in a shard.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence

from data_prep.shards import ShardError, open_shard


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
    path = source.partition("://")[2] or source
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
    """Size and modification time of a shard. Raises ShardError where it is not there."""
    if "://" not in source:
        try:
            found = os.stat(source)
        except OSError as error:
            raise ShardError(f"cannot open shard {source}: {error.strerror}") from error
        return f"size:{found.st_size} mtime_ns:{found.st_mtime_ns}"
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(source)
    info = filesystem.get_file_info(path)
    if not info.is_file:
        raise ShardError(f"cannot open shard {source}: no such file")
    return f"size:{info.size} mtime_ns:{info.mtime_ns}"
