"""Which input shards a user's words name, what each is called, and whether it has changed.

Looks at paths, sizes, times and bytes; knows nothing of what is in a sample.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.archive import open_archive
from data_prep.sources.config import SourceConfig
from data_prep.sources.listing import ShardError
from data_prep.sources.loose_files import LooseFiles
from data_prep.storage.location import file_version
from data_prep.storage.store import open_folder
from data_prep.storage.uris import check_scheme, is_uri, is_web, shown

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
"""Names of shards; what is inside shows in their first bytes."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_USUAL = SourceConfig()
MAX_SHARDS = 1_000_000


def find_shards(source: str, config: SourceConfig = _USUAL) -> list[str]:
    """The shards that `source` names, in order.

    A folder with tars means its tars, sorted. Without tars it is one of two layouts of loose files:
    media lie directly in it, and it is one shard with all that is below; or they lie in subfolders
    (as video2dataset's `files` output has them), and each subfolder that holds samples is a shard.

    Args:
        source: a folder, a tar or URI (of a store, `https://` or `hf://datasets/`), a range such
            as `s3://b/{00000..00099}.tar`, or a local `.txt` file with one of these per line, whose
            relative paths begin at its own folder.
        config: which loose files are media and captions.

    Raises:
        ShardError: nothing is there, it is not clear which, or a range is empty or huge.
        StorageError: a store or server that has to be asked fails; a kind of place that is not
            read; credentials in a URI.

    >>> find_shards("s3://bucket/{08..10}.tar")
    ['s3://bucket/08.tar', 's3://bucket/09.tar', 's3://bucket/10.tar']
    """
    _check_place(source)
    if match := _RANGE.search(source):
        return [shard for each in _expand(source, match) for shard in _one_or_more(each, config)]
    if is_uri(source):
        return _in_store(source)
    path = Path(source)
    if path.is_dir():
        return _in_folder(path, config)
    if path.suffix == ".txt" and path.is_file():
        return _in_list(path, config)
    if not path.is_file():
        raise ShardError(
            f"no shards at {source!r}: give a folder, a .tar, a {{00000..00099}}.tar range "
            "or a .txt list"
        )
    return [source]


def _in_store(source: str) -> list[str]:
    """A file of a store or of the web, or the tars right below a folder of it."""
    place, mark, query = source.partition("?")
    if place.endswith(TAR_SUFFIXES):
        return [source]
    if place.endswith(".txt"):
        raise ShardError(
            f"{shown(source)}: a list is read from a local disk alone; download it and give its "
            "path"
        )
    names = [name for name in _names_below(source) if name.endswith(TAR_SUFFIXES)]
    if not names:
        raise ShardError(f"no *.tar in {shown(source)}; give a prefix of WebDataset shards")
    return [f"{place.rstrip('/')}/{name}{mark}{query}" for name in names]


def _check_place(source: str) -> None:
    """Refuse what cannot be read before anything is asked for. Raises StorageError."""
    check_scheme(source)
    if is_web(source):
        from data_prep.storage.web import address_of

        address_of(source)


def _names_below(source: str) -> list[str]:
    """Names of the files right below a URI."""
    if not is_web(source):
        return open_folder(source).names()
    from data_prep.storage.web import names_in

    return names_in(source)


def _one_or_more(source: str, config: SourceConfig) -> list[str]:
    """What one name of a range stands for; a file is not looked for before it is opened."""
    is_several = _RANGE.search(source) or Path(source).is_dir()
    return find_shards(source, config) if is_several else [source]


def _in_folder(path: Path, config: SourceConfig) -> list[str]:
    media_suffixes = tuple(f".{suffix}" for suffix in config.media_suffixes)
    sample_suffixes = (*media_suffixes, *(f".{suffix}" for suffix in config.text_suffixes))
    tars = sorted(str(p) for p in path.iterdir() if p.name.endswith(TAR_SUFFIXES))
    loose = _holds(path, media_suffixes)
    subfolders = [
        p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith((".", "_"))
    ]
    mixed = loose or any(_holds(p, media_suffixes, deep=True) for p in subfolders if tars)
    if tars and mixed:
        raise ShardError(
            f"{path} holds both tars and loose media; "
            "name those that you mean in a .txt list, one per line"
        )
    if tars:
        return tars
    if loose:
        return [str(path)]
    if inside := [str(p) for p in subfolders if _holds(p, sample_suffixes, deep=True)]:
        return inside
    raise ShardError(
        f"no samples in {path}: no WebDataset *.tar, no folders of samples, no media files"
    )


def _holds(folder: Path, suffixes: tuple[str, ...], *, deep: bool = False) -> bool:
    """Whether a folder has a file of such a suffix (`deep`: anywhere below). Links do not count."""
    for base, folders, names in os.walk(folder):
        folders.sort()
        media = (n for n in names if n.lower().endswith(suffixes) and not n.startswith("."))
        if any(not os.path.islink(os.path.join(base, n)) for n in media):
            return True
        if not deep:
            return False
    return False


def _in_list(path: Path, config: SourceConfig) -> list[str]:
    shards: list[str] = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if entry.endswith(".txt"):
            raise ShardError(f"{path} names another list, {entry!r}; write its lines here instead")
        local = "://" not in entry
        shards += find_shards(str(path.parent / entry) if local else entry, config)
    if not shards:
        raise ShardError(f"{path} names no shard; write one tar, folder, range or URI per line")
    return shards


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
    """The source of each shard by its name: the shortest path ending that tells it from others.

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
        raise ShardError(f"shards given twice: {', '.join(map(shown, twice))}")
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
    path = (shown(source).partition("://")[2] or source).rstrip("/")
    folder, _, base = path.rpartition("/")
    for suffix in TAR_SUFFIXES:
        base = base.removesuffix(suffix)
    return f"{folder}/{base}".strip("/") if folder else base


def content_sha256(source: str) -> str:
    """Hex SHA-256 of a shard's content. Raises ShardError where it is not there."""
    archive = open_archive(source)
    try:
        return archive.content_sha256()
    finally:
        archive.close()


def fingerprint(source: str) -> str:
    """What changes when a shard does: size and modification time, or a store's etag.

    Of a folder it is a digest of the names, sizes and times of all files in it.

    Raises:
        ShardError: it is not there.
        StorageError: the disk or store fails.
    """
    try:
        if not is_uri(source) and stat.S_ISDIR(os.stat(source).st_mode):
            return LooseFiles(source).fingerprint()
        return file_version(source)
    except FileNotFoundError as error:
        raise ShardError(f"cannot open shard {shown(source)}: no such file") from error
