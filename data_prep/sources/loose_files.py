"""What lies in a folder of loose files: a downloader's `files` layout, or anybody's plain folder.

Links are not followed and nothing outside the folder is read. Knows nothing of samples.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.listing import Listing, Member, ShardError
from flowreel.values import sha256_of


class LooseFiles:
    """A folder of loose files, read as a shard.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("text")
    >>> files = LooseFiles(str(folder))
    >>> members = files.listing().members
    >>> members[0].name, files.read(members[0], max_bytes=100)
    ('a.txt', b'text')
    """

    def __init__(self, source: str) -> None:
        """Take the folder at a path. Raises ShardError where there is no such folder."""
        self.source = source
        if not Path(source).is_dir():
            raise ShardError(f"cannot open shard {source}: no such folder")
        self._digests: dict[str, str] = {}

    def listing(self) -> Listing:
        """Every regular file below the folder, by name; links are not followed."""
        listing = Listing()
        for name, entry in _walk(Path(self.source), ""):
            about = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(about.st_mode):
                listing.ignored += 1
            else:
                listing.take(name, about.st_size, about.st_mtime_ns)
        return listing

    def read(self, member: Member, max_bytes: int) -> bytes | None:
        """The whole file; None over `max_bytes`; no bytes if it is gone or may not be read."""
        if member.size_bytes > max_bytes:
            return None
        # Between the listing and now the file may have become a link, or a pipe without a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(Path(self.source) / member.name, flags)
            with open(descriptor, "rb") as file:
                data = file.read(max_bytes + 1)
        except OSError:
            return b""
        self._digests[member.name] = hashlib.sha256(data).hexdigest()
        return data if len(data) <= max_bytes else None

    def content_sha256(self) -> str:
        """Hex SHA-256 of the names and contents of all files, in the order of their names."""
        digest = hashlib.sha256()
        for member in self.listing().members:
            path = Path(self.source) / member.name
            content = self._digests.get(member.name) or _sha256_if_readable(path)
            digest.update(os.fsencode(f"{member.name}\0{content}\n"))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Number of files, bytes, and a digest of all names, sizes and times."""
        members = self.listing().members
        digest = hashlib.sha256(ascii(members).encode()).hexdigest()[:16]
        size_bytes = sum(member.size_bytes for member in members)
        return f"files:{len(members)} size:{size_bytes} listing:{digest}"

    def close(self) -> None:
        """Do nothing: no file stays open between two calls."""


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative name and entry of everything that is not a folder, sorted, depth first."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in ordered:
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith("."):
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry


def _sha256_if_readable(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:
        return "unreadable"
