"""What lies in a tar shard, plain or compressed, whatever state the tar is in.

Listing comes first and reads headers only, so that the members of one sample may lie anywhere.
Reading is one pass forward, which hashes all that it sees. Nothing is extracted, no link is
followed, and no header can make this read backwards, without end, or hold more than its caller
allows. Knows nothing of samples.
"""

from __future__ import annotations

import tarfile
import zlib
from typing import IO, Any

from data_prep.sources.listing import DecompressionBomb, Listing, Member, ShardError
from data_prep.sources.unpacking import (
    BROKEN,
    MAGIC_BYTES,
    Hashed,
    Unpacked,
    compression_of,
)
from data_prep.storage.location import open_stream, shown

MAX_MEMBERS = 5_000_000
_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_BROKEN = (tarfile.TarError, zlib.error, *BROKEN)
_TRUNCATED_HEADER = tarfile.TruncatedHeaderError  # type: ignore[attr-defined]
_INVALID_HEADER = tarfile.InvalidHeaderError  # type: ignore[attr-defined]
_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def open_shard(source: str, *, seekable: bool = False) -> IO[bytes]:
    """Open a tar, by a local path or the URI of a store or of the web (s3://, https://, hf://).

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
            self.compression = compression_of(file.read(MAGIC_BYTES))
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
        """Archives may lie one after the other in a file (`cat a.tar b.tar`): all are listed."""
        forward = Unpacked(file, self.compression) if self.compression else None
        blocks: Any = _Blocks(forward) if forward is not None else file
        while True:
            header = _header_class(listing)
            with tarfile.open(fileobj=blocks, mode="r:", tarinfo=header) as tar:
                for member in tar:
                    # tarfile keeps a list of past members, which would grow with the shard.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.isreg() and not member.issparse():
                        listing.take(member.name, member.size, member.offset_data)
                    elif not member.isdir():
                        listing.ignored += 1
                    if len(listing.members) + listing.ignored > MAX_MEMBERS:
                        raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")
            if not _goes_on(blocks):
                return

    def read(self, member: Member, max_bytes: int) -> bytes | None:
        """The whole member; None over `max_bytes`; fewer bytes where the tar is cut."""
        if member.size_bytes > max_bytes:
            return None
        if self._forward is None:
            self._forward = _Forward(open_shard(self.source), self.compression)
        if member.offset >= self._forward.place:
            return self._forward.read_at(member.offset, member.size_bytes)
        return self._read_back(member)

    def _read_back(self, member: Member) -> bytes:
        """A member that the forward pass has left behind."""
        if self._random is None or self.compression:
            self._close_random()
            self._random = open_shard(self.source, seekable=True)
        if self.compression:
            # A packed stream has no way back: it is unpacked from the start again, dear but right.
            return _Forward(self._random, self.compression).read_at(
                member.offset, member.size_bytes
            )
        self._random.seek(member.offset)
        return self._random.read(member.size_bytes)

    def content_sha256(self) -> str:
        """Hex SHA-256 of the shard's whole content, most of which has been read by now."""
        if self._forward is None:
            self._forward = _Forward(open_shard(self.source), self.compression)
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


class _Blocks:
    """An unpacked stream as a file that goes forward only, but for the block read last."""

    def __init__(self, stream: Unpacked) -> None:
        self._stream = stream
        self._last = b""
        self._place = 0
        self._back = 0

    def read(self, size_bytes: int) -> bytes:
        """The next bytes; fewer only at the end."""
        data = self._last[len(self._last) - self._back :][:size_bytes] if self._back else b""
        self._back -= len(data)
        while len(data) < size_bytes and (more := self._stream.read(size_bytes - len(data))):
            data += more
        if not self._back:
            self._last = data or self._last
        self._place += len(data)
        return data

    def tell(self) -> int:
        """Bytes so far."""
        return self._place

    def seek(self, place: int, whence: int = 0) -> int:
        """Skip forward, to the end at most; or back by no more than was read last."""
        back = self._place - place
        if 0 < back <= len(self._last) - self._back:
            self._back, self._place = self._back + back, place
        elif back > 0:
            raise tarfile.ReadError("the tar's headers lead backwards")
        while self._place < place and self.read(min(_CHUNK_BYTES, place - self._place)):
            pass
        return self._place


def _goes_on(blocks: Any) -> bool:
    """Whether another archive follows the zeros that end one; stands before its header then."""
    while block := blocks.read(tarfile.BLOCKSIZE):
        if block.count(0) == len(block):
            continue
        blocks.seek(blocks.tell() - len(block))
        return _is_header(block)
    return False


def _is_header(block: bytes) -> bool:
    """Whether a block's checksum is that of a header; bytes after an archive may be anything."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Forward:
    """One pass over a tar's bytes, unpacked; `place` is where it stands."""

    def __init__(self, stream: IO[bytes], compression: str) -> None:
        self._stream = stream
        self._bytes = Unpacked(stream, compression) if compression else Hashed(stream)
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
