"""What lies in a tar shard, plain or gzip, whatever state the tar is in.

Listing comes first and reads headers only, so that the members of one sample may lie anywhere.
Reading is one pass forward, which hashes all that it sees. Nothing is extracted, no link is
followed, and no header can make this read backwards, without end, or hold more than its caller
allows. Knows nothing of samples.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from typing import IO, Any, cast

from data_prep.sources.listing import DecompressionBomb, Listing, Member, ShardError
from data_prep.storage.location import open_stream, shown

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


class TarArchive:
    """A tar in whatever state. Take its `listing` first, then `read` members, best in that order.

    >>> import io, tempfile
    >>> path = tempfile.mktemp(".tar")
    >>> with tarfile.open(path, "w") as tar:
    ...     header = tarfile.TarInfo("a.txt")
    ...     header.size = 4
    ...     tar.addfile(header, io.BytesIO(b"text"))
    >>> archive = TarArchive(path)
    >>> members = archive.listing().members
    >>> members[0].name, archive.read(members[0], max_bytes=100)
    ('a.txt', b'text')
    >>> archive.close()
    """

    def __init__(self, source: str) -> None:
        """Open the tar at a path or URI. Raises ShardError where that cannot be done."""
        self.source = source
        with open_shard(source, seekable=True) as file:
            self.is_gzip = file.read(2) == b"\x1f\x8b"
        self._forward: _Forward | None = None
        self._random: IO[bytes] | None = None

    def listing(self) -> Listing:
        """Every member until the end or the cut; never raises on the content."""
        listing = Listing()
        with open_shard(self.source, seekable=True) as file:
            try:
                self._list(file, listing)
            except _BROKEN as error:
                listing.truncated = bool(listing.members or listing.ignored)
                if isinstance(error, DecompressionBomb):
                    listing.error = str(error)
                elif not listing.truncated:
                    listing.error = f"not a readable tar: {error}"
        return listing

    def _list(self, file: IO[bytes], listing: Listing) -> None:
        header = _header_class(listing)
        options: dict[str, Any] = {"fileobj": file, "mode": "r:", "tarinfo": header}
        if self.is_gzip:
            options |= {"fileobj": _Unpacked(file), "mode": "r|"}
        with tarfile.open(**options) as tar:
            for member in tar:
                # tarfile keeps a list of past members, which would grow with the shard.
                tar.members = []  # type: ignore[attr-defined]
                if member.isreg() and not member.issparse():
                    listing.take(member.name, member.size, member.offset_data)
                elif not member.isdir():
                    listing.ignored += 1
                if len(listing.members) + listing.ignored > MAX_MEMBERS:
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
        """A member that the forward pass has left behind."""
        if self._random is None or self.is_gzip:
            self._close_random()
            self._random = open_shard(self.source, seekable=True)
        if self.is_gzip:
            # A gzip stream has no way back: it is unpacked from the start again, dear but right.
            return _Forward(self._random, True).read_at(member.offset, member.size_bytes)
        self._random.seek(member.offset)
        return self._random.read(member.size_bytes)

    def content_sha256(self) -> str:
        """Hex SHA-256 of the shard's whole content, most of which has been read by now."""
        if self._forward is None:
            self._forward = _Forward(open_shard(self.source), self.is_gzip)
        return self._forward.hexdigest()

    def close(self) -> None:
        """Close the streams that reading has opened."""
        if self._forward is not None:
            self._forward.close()
        self._close_random()

    def _close_random(self) -> None:
        if self._random is not None:
            self._random.close()


def _header_class(listing: Listing) -> type[tarfile.TarInfo]:
    """A header class for tars that nobody vouches for; tarfile itself stops silently at damage."""

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
            start = tar.offset
            try:
                header = super().fromtarfile(tar)
                # An extended header may set the size anew.
                if header.size < 0 or tar.offset <= start:
                    raise _INVALID_HEADER(f"a header claims {header.size} bytes")
            except (_TRUNCATED_HEADER, _INVALID_HEADER):
                listing.truncated = True
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
        """Hex SHA-256 of the whole stream: what follows the archive's end is read too."""
        while self.read(_CHUNK_BYTES):
            pass
        return self._hash.hexdigest()


class _Unpacked:
    """The tar inside a gzip stream, as long as it grows like one.

    Raises DecompressionBomb where more came out than `MAX_GROWTH` times what went in.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = _Hashed(stream)
        self._file = gzip.GzipFile(fileobj=cast("IO[bytes]", self._stream))
        self._size_bytes = 0

    def read(self, size_bytes: int) -> bytes:
        data = self._file.read(size_bytes)
        self._size_bytes += len(data)
        allowed = max(FREE_GROWTH_BYTES, MAX_GROWTH * self._stream.size_bytes)
        if self._size_bytes > allowed:
            raise DecompressionBomb(
                f"decompression bomb: {self._stream.size_bytes} bytes unpack to more than {allowed}"
            )
        return data

    def hexdigest(self) -> str:
        return self._stream.hexdigest()


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
            remaining = size_bytes
            while remaining and (piece := self._take(remaining)):
                pieces.append(piece)
                remaining -= len(piece)
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
