"""The shard behind a path or URI: a tar or a folder of loose files. Knows nothing of samples."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.loose_files import LooseFiles
from data_prep.sources.tar_archive import TarArchive

Archive = TarArchive | LooseFiles
"""Both have `listing`, `read`, `content_sha256` and `close`."""


def open_archive(source: str) -> Archive:
    """The shard at a path or URI. Raises ShardError where there is none."""
    is_folder = "://" not in source and Path(source).is_dir()
    return LooseFiles(source) if is_folder else TarArchive(source)
