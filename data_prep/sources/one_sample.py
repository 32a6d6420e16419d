"""One sample of a shard, read without the others; and a file by itself, read as a shard.

What a sample is, and what is wrong with it, is decided where every shard is read
(`data_prep.sources.samples`): the listing is whole, only the bytes of other samples are spared.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_prep.sources.archive import Archive, open_archive
from data_prep.sources.config import SourceConfig
from data_prep.sources.find import TAR_SUFFIXES
from data_prep.sources.listing import Listing, Member, ShardError
from data_prep.sources.loose_files import LooseFiles
from data_prep.sources.samples import Group, group_members, without_leftovers


class LooseFile(LooseFiles):
    """A file and the texts beside it that belong to it, as a shard.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("a.mp4", "a.txt", "b.mp4"):
    ...     _ = (folder / name).write_bytes(b"...")
    >>> file = LooseFile(folder / "a.mp4", SourceConfig())
    >>> [member.name for member in file.listing().members]
    ['a.mp4', 'a.txt']
    """

    def __init__(self, path: Path, config: SourceConfig) -> None:
        """Take the file at a path. Raises ShardError where it is none."""
        self._other_media = config.media_suffixes
        super().__init__(str(path.absolute().parent))
        self.path = path.absolute()
        if not path.exists():
            raise ShardError(f"{path}: no such file; give a video, an image or a shard")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ShardError(f"{path} is no ordinary file; give a video, an image or a shard")

    def listing(self) -> Listing:
        """The file, and what lies beside it under its name up to the first dot but is no media."""
        listing = Listing()
        begin = self.path.name.partition(".")[0] + "."
        with os.scandir(self.source) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        for entry in ordered:
            is_it = entry.name == self.path.name
            suffix = entry.name.rpartition(".")[2].lower()
            beside = (
                entry.name.startswith(begin)
                and suffix not in self._other_media
                and entry.is_file(follow_symlinks=False)
            )
            if is_it or beside:
                # The user named the file, so it may be a link; a text beside it may not.
                about = entry.stat(follow_symlinks=is_it)
                listing.take(entry.name, about.st_size, about.st_mtime_ns)
        return listing

    def read(self, member: Member, max_bytes: int) -> bytes | None:
        """As a folder reads it, but that the file itself may be a link."""
        if member.name != self.path.name:
            return super().read(member, max_bytes)
        return None if member.size_bytes > max_bytes else self.path.read_bytes()


class OneSample:
    """A shard that gives the bytes of one sample only, and lists all.

    Args:
        archive: the shard.
        listing: what lies in it.
        group: the members of the sample.
    """

    def __init__(self, archive: Archive, listing: Listing, group: Group) -> None:
        self._archive = archive
        self._listing = listing
        self._names = {member.name for member in group.members.values()}

    def listing(self) -> Listing:
        """Every member of the shard."""
        return self._listing

    def read(self, member: Member, max_bytes: int) -> bytes | None:
        """The whole member of the sample; nothing of any other."""
        return self._archive.read(member, max_bytes) if member.name in self._names else b""

    def content_sha256(self) -> str:
        """Hex SHA-256 of the shard's whole content."""
        return self._archive.content_sha256()

    def close(self) -> None:
        """Close the shard."""
        self._archive.close()


def is_shard(source: str) -> bool:
    """Whether a user's word names a shard, rather than a file by itself.

    >>> is_shard("s3://b/0.tar"), is_shard("clips/0.tar.zst"), is_shard("clips/a.mp4")
    (True, True, False)
    """
    return "://" in source or source.endswith(TAR_SUFFIXES) or Path(source).is_dir()


def open_any(source: str, config: SourceConfig) -> tuple[Archive, Listing]:
    """A shard, or a file by itself, and what lies in it.

    Raises:
        ShardError: it is not there, or nothing in it can be read.
    """
    archive = open_archive(source) if is_shard(source) else LooseFile(Path(source), config)
    listing = archive.listing()
    if not listing.members:
        archive.close()
        nothing = "it holds no file that is read; hidden files and links are left out"
        raise ShardError(f"{source}: {listing.error or nothing}")
    return archive, listing


def groups_in(listing: Listing, config: SourceConfig) -> list[Group]:
    """The samples of a shard, as members, in the order in which they are numbered."""
    return group_members(without_leftovers(listing.members, config), config)
