"""What lies in a shard, member by member: a tar (plain or gzip) or a folder of loose files.

Listing comes first and reads headers only, so that members of one sample may lie anywhere; reading
is one pass forward, hashing all it sees. Nothing is extracted, no link is followed, and no header
can make this read backwards, without end, or hold more than its caller allows. Knows no samples.

    ShardError(ValueError)     a shard that cannot be opened at all
    └── PackedTooWell          a gzip shard that grows as no media does: a decompression bomb
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from data_prep.storage.location import open_stream, shown
from flowreel.errors import FlowreelError

MAX_MEMBERS = 5_000_000
MAX_GROWTH = 100
"""A gzip shard may unpack to this many times what was read of it (media hardly shrink at all)..."""
FREE_GROWTH_BYTES = 64 * 2**20
"""...once it has unpacked to more than this."""
_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)
_TRUNCATED_HEADER = tarfile.TruncatedHeaderError  # type: ignore[attr-defined]
_INVALID_HEADER = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class ShardError(FlowreelError, ValueError):
    """A shard that cannot be opened or written."""

    reason = "unreadable_shard"


class PackedTooWell(ShardError):
    """A compressed shard that grows beyond what media can; reading it stops."""


class Member(NamedTuple):
    """A regular file in a shard."""

    name: str
    size_bytes: int
    offset: int
    """Where its bytes begin in the unpacked tar; in a folder, its modification time in ns."""


@dataclass
class Listing:
    """All that can be told of a shard without reading its files."""

    members: list[Member] = field(default_factory=list)
    truncated: bool = False
    """The tar ends, or is damaged, after the last member's header."""
    ignored: int = 0
    """Links, devices, sparse files, names that climb or are absolute."""
    error: str = ""
    """Why nothing more could be read, where that is so."""

    def take(self, name: str, size_bytes: int, offset: int) -> None:
        """Add a regular member, unless its name is no plain relative path."""
        if not is_harmless(name) or name.rpartition("/")[2].startswith("."):
            self.ignored += 1
        else:
            self.members.append(Member(name, size_bytes, offset))


def is_harmless(name: str) -> bool:
    """Whether a member's name is relative, does not climb, and holds no NUL."""
    return not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


def open_shard(source: str, *, seekable: bool = False) -> IO[bytes]:
    """Open a tar, a local path or any URI that pyarrow knows (s3://, gs://, file://).

    Args:
        source: path or URI.
        seekable: for reading here and there; otherwise for one pass.

    Raises:
        ShardError: it is not there.
        StorageError: the disk or store fails, now or while it is read: no fault of the shard's.
    """
    try:
        return open_stream(source, seekable=seekable)
    except (FileNotFoundError, ValueError) as error:
        raise ShardError(f"cannot open shard {shown(source)}: {error}") from error


class Tar:
    """A tar in whatever state. `list` first, then `read` members, best in the order listed."""

    def __init__(self, source: str) -> None:
        """Raises ShardError where it cannot be opened."""
        self.source = source
        with open_shard(source, seekable=True) as file:
            self.is_gzip = file.read(2) == b"\x1f\x8b"
        self._forward: _Forward | None = None
        self._random: IO[bytes] | None = None

    def list(self) -> Listing:
        """Every member until the end or the cut; never raises on the content."""
        found = Listing()
        with open_shard(self.source, seekable=True) as file:
            try:
                self._list(file, found)
            except _BROKEN as error:
                found.truncated = bool(found.members or found.ignored)
                if isinstance(error, PackedTooWell):
                    found.error = str(error)
                elif not found.truncated:
                    found.error = f"not a readable tar: {error}"
        return found

    def _list(self, file: IO[bytes], found: Listing) -> None:
        header = _header_class(found)
        opened: dict[str, Any] = {"fileobj": file, "mode": "r:", "tarinfo": header}
        if self.is_gzip:
            opened |= {"fileobj": _Unpacked(file), "mode": "r|"}
        with tarfile.open(**opened) as tar:
            for member in tar:
                # The list of past members would grow with the shard.
                tar.members = []  # type: ignore[attr-defined]
                if member.isreg() and not member.issparse():
                    found.take(member.name, member.size, member.offset_data)
                else:
                    found.ignored += not member.isdir()
                if len(found.members) + found.ignored > MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")

    def read(self, member: Member, max_bytes: int) -> bytes | None:
        """The whole member; None over `max_bytes`; fewer bytes where the tar is cut."""
        if member.size_bytes > max_bytes:
            return None
        if self._forward is None:
            self._forward = _Forward(open_shard(self.source), self.is_gzip)
        if member.offset >= self._forward.place:
            return self._forward.read_at(member.offset, member.size_bytes)
        return self._read_back(member)

    def _read_back(self, member: Member) -> bytes:
        """What the forward pass has left behind."""
        if self._random is None or self.is_gzip:
            self._close_random()
            self._random = open_shard(self.source, seekable=True)
        if self.is_gzip:
            # Only by unpacking from the start again: dear, but right.
            return _Forward(self._random, True).read_at(member.offset, member.size_bytes)
        self._random.seek(member.offset)
        return self._random.read(member.size_bytes)

    def content_sha256(self) -> str:
        """Of the shard's whole content, most of which has been read by now."""
        if self._forward is None:
            self._forward = _Forward(open_shard(self.source), self.is_gzip)
        return self._forward.hexdigest()

    def close(self) -> None:
        if self._forward is not None:
            self._forward.close()
        self._close_random()

    def _close_random(self) -> None:
        if self._random is not None:
            self._random.close()


def _header_class(found: Listing) -> type[tarfile.TarInfo]:
    """A header class for files of unknown make: tells damage, at which tarfile silently stops."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
            header = super().frombuf(buf, encoding, errors)
            # Base-256 fields can be negative, and long names are read whole into memory.
            if header.size < 0 or (header.type in _LONG_HEADERS and header.size > _HEADER_BYTES):
                raise _INVALID_HEADER(f"a header claims {header.size} bytes")
            if header.type == tarfile.GNUTYPE_SPARSE:
                raise _INVALID_HEADER("old sparse files are not read")
            return header

        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> Header:
            begun = tar.offset
            try:
                header = super().fromtarfile(tar)
                # An extended header may set the size anew.
                if header.size < 0 or tar.offset <= begun:
                    raise _INVALID_HEADER(f"a header claims {header.size} bytes")
            except (_TRUNCATED_HEADER, _INVALID_HEADER):
                found.truncated = True
                raise
            return header

        def _sparse_map(self, member: tarfile.TarInfo, *_: object) -> None:
            """A sparse file claims any size while holding a few bytes: its map is not read."""
            member.sparse = b""

        _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse_map

    return Header


class _Hashed:
    """A stream that hashes what is read from it, so that no second pass is needed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size_bytes: int) -> bytes:
        data = self._stream.read(size_bytes)
        self._hash.update(data)
        self.size_bytes += len(data)
        return data

    def hexdigest(self) -> str:
        """Of the whole stream: what follows the archive's end is read too."""
        while self.read(_CHUNK_BYTES):
            pass
        return self._hash.hexdigest()


class _Unpacked:
    """The tar inside a gzip stream, as long as it grows like one.

    Raises PackedTooWell where more came out than `MAX_GROWTH` times what went in.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._packed = _Hashed(stream)
        self._file = gzip.GzipFile(fileobj=cast("IO[bytes]", self._packed))
        self._size_bytes = 0

    def read(self, size_bytes: int) -> bytes:
        data = self._file.read(size_bytes)
        self._size_bytes += len(data)
        allowed = max(FREE_GROWTH_BYTES, MAX_GROWTH * self._packed.size_bytes)
        if self._size_bytes > allowed:
            raise PackedTooWell(
                f"decompression bomb: {self._packed.size_bytes} bytes unpack to more than {allowed}"
            )
        return data

    def hexdigest(self) -> str:
        return self._packed.hexdigest()


class _Forward:
    """One pass over a tar's bytes, unpacked; `place` is where it stands."""

    def __init__(self, stream: IO[bytes], is_gzip: bool) -> None:
        self._stream = stream
        self._bytes: _Unpacked | _Hashed = _Unpacked(stream) if is_gzip else _Hashed(stream)
        self.place = 0

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        """`size_bytes` from `offset` on, or what there is before the cut."""
        try:
            while self.place < offset and (skipped := self._take(offset - self.place)):
                del skipped
            if self.place < offset:
                return b""
            pieces = []
            left = size_bytes
            while left and (piece := self._take(left)):
                pieces.append(piece)
                left -= len(piece)
            return b"".join(pieces)
        except _BROKEN:
            return b""

    def _take(self, at_most: int) -> bytes:
        data = self._bytes.read(min(at_most, _CHUNK_BYTES))
        self.place += len(data)
        return data

    def hexdigest(self) -> str:
        return self._bytes.hexdigest()

    def close(self) -> None:
        self._stream.close()


class Folder:
    """Loose files, as a downloader's `files` layout or anybody's plain folder has them."""

    def __init__(self, source: str) -> None:
        """Raises ShardError where there is no such folder."""
        self.source = source
        if not Path(source).is_dir():
            raise ShardError(f"cannot open shard {source}: no such folder")
        self._digests: dict[str, str] = {}

    def list(self) -> Listing:
        """Every regular file below the folder, by name; links are not followed."""
        found = Listing()
        for name, entry in _walk(Path(self.source), ""):
            about = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(about.st_mode):
                found.ignored += 1
            else:
                found.take(name, about.st_size, about.st_mtime_ns)
        return found

    def read(self, member: Member, max_bytes: int) -> bytes | None:
        """The whole file; None over `max_bytes`; no bytes where it has gone or may not be read."""
        if member.size_bytes > max_bytes:
            return None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            file = os.open(Path(self.source) / member.name, flags)
            with open(file, "rb") as opened:
                data = opened.read(max_bytes + 1)
        except OSError:
            return b""
        self._digests[member.name] = hashlib.sha256(data).hexdigest()
        return data if len(data) <= max_bytes else None

    def content_sha256(self) -> str:
        """Of names and contents of all files, in the order of their names."""
        digest = hashlib.sha256()
        for member in self.list().members:
            content = self._digests.get(member.name) or _file_sha256(
                Path(self.source) / member.name
            )
            digest.update(os.fsencode(f"{member.name}\0{content}\n"))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Number of files, bytes, and a digest of all names, sizes and times."""
        members = self.list().members
        digest = hashlib.sha256(ascii(members).encode()).hexdigest()[:16]
        size_bytes = sum(member.size_bytes for member in members)
        return f"files:{len(members)} size:{size_bytes} listing:{digest}"

    def close(self) -> None:
        """Holds nothing."""


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(relative name, entry) of all that is no folder, sorted, depth first."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in ordered:
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith("."):
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


def open_members(source: str) -> Tar | Folder:
    """The shard behind a path or URI. Raises ShardError where there is none."""
    return Folder(source) if "://" not in source and Path(source).is_dir() else Tar(source)
