"""The shard behind a path or URI: a tar or a folder of loose files. Knows nothing of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from data_prep.sources.listing import Listing, Member
from data_prep.sources.loose_files import LooseFiles
from data_prep.sources.tar_archive import TarArchive


class Archive(Protocol):
    """What a shard can be asked, whichever kind it is."""

    def listing(self) -> Listing:
        """Every member, in order."""
        ...

    def read(self, member: Member, max_bytes: int) -> bytes | None:
        """The whole member; None over `max_bytes`; fewer bytes where the shard is cut."""
        ...

    def content_sha256(self) -> str:
        """Hex SHA-256 of the whole content."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


def open_archive(source: str) -> Archive:
    """The shard at a path or URI. Raises ShardError where there is none."""
    is_folder = "://" not in source and Path(source).is_dir()
    return LooseFiles(source) if is_folder else TarArchive(source)
