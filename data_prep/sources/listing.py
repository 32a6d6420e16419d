"""What lies in a shard, member by member, and what is wrong with a shard as a whole.

Knows nothing of samples, and reads no file.

    ShardError(FlowreelError, ValueError)   a shard that cannot be opened or written at all
    └── DecompressionBomb                   a gzip shard that grows as no media does
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from flowreel.errors import FlowreelError


class ShardError(FlowreelError, ValueError):
    """A shard that cannot be opened or written."""

    reason = "unreadable_shard"


class DecompressionBomb(ShardError):
    """A compressed shard that grows beyond what media can; reading it stops."""


class Member(NamedTuple):
    """A regular file in a shard."""

    name: str
    size_bytes: int
    offset: int
    """Where its bytes begin in the unpacked tar; in a folder, its modification time in ns."""


@dataclass
class Listing:
    """All that can be told of a shard without reading its files.

    >>> listing = Listing()
    >>> for name in ("a.mp4", "../climbs.mp4", ".hidden"):
    ...     listing.take(name, size_bytes=1, offset=0)
    >>> [member.name for member in listing.members], listing.ignored
    (['a.mp4'], 2)
    """

    members: list[Member] = field(default_factory=list)
    truncated: bool = False
    """The tar ends, or is damaged, after the last member's header."""
    ignored: int = 0
    """Links, devices, sparse files, hidden files, names that climb or are absolute."""
    error: str = ""
    """Why nothing more could be read, where that is so."""

    def take(self, name: str, size_bytes: int, offset: int) -> None:
        """Add a regular member, unless its name is no plain relative path."""
        if not is_harmless(name) or name.rpartition("/")[2].startswith("."):
            self.ignored += 1
        else:
            self.members.append(Member(name, size_bytes, offset))


def is_harmless(name: str) -> bool:
    """Whether a member's name is relative, does not climb, and holds no NUL.

    >>> is_harmless("clips/a.mp4"), is_harmless("../a.mp4"), is_harmless("/a.mp4")
    (True, False, False)
    """
    return not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
