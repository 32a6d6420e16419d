"""The tar inside a compressed shard, as a stream that grows like one.

Which compression it is shows in the first bytes, whatever the file is called. What unpacks to more
than media can is left. Knows nothing of samples.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from collections.abc import Callable
from typing import IO, Any, Protocol, cast

from data_prep.sources.listing import DecompressionBomb

MAX_GROWTH = 100
"""A compressed shard may unpack to this many times what was read of it (media hardly shrink)..."""
FREE_GROWTH_BYTES = 64 * 2**20
"""...once it has unpacked to more than this."""
MAGIC_BYTES = 6
_XZ_MEMORY_BYTES = 512 * 2**20
"""What an xz stream may ask for as its dictionary."""
_CHUNK_BYTES = 1 << 20
_SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
}

BROKEN = (lzma.LZMAError, EOFError, OSError, ValueError)
"""What a damaged stream raises."""


def compression_of(head: bytes) -> str:
    """The compression that a file's first bytes show; empty of none.

    >>> compression_of(bytes.fromhex("28b52ffd0000")), compression_of(b"a.mp4")
    ('zstd', '')
    """
    names = (name for magic, name in _SIGNATURES.items() if head.startswith(magic))
    return next(names, "")


class _Readable(Protocol):
    def read(self, size_bytes: int, /) -> bytes: ...


class Hashed:
    """A stream that hashes what is read from it, so that no second pass is needed."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size_bytes: int = -1) -> bytes:
        """The next bytes, at most so many."""
        data = self._stream.read(size_bytes)
        self._hash.update(data)
        self.size_bytes += len(data)
        return data

    def close(self) -> None:
        """Do nothing: whoever opened the stream closes it. pyarrow asks for this."""

    def hexdigest(self) -> str:
        """Hex SHA-256 of the whole stream: what follows the archive's end is read too."""
        while self.read(_CHUNK_BYTES):
            pass
        return self._hash.hexdigest()


class Unpacked:
    """What is inside a compressed stream.

    >>> import io
    >>> Unpacked(io.BytesIO(bz2.compress(b"inside")), "bzip2").read(100)
    b'inside'

    Raises DecompressionBomb where more came out than `MAX_GROWTH` times what went in.
    """

    def __init__(self, stream: IO[bytes], compression: str) -> None:
        self._packed = Hashed(stream)
        self._file = _OPENERS[compression](self._packed)
        self._size_bytes = 0

    def read(self, size_bytes: int) -> bytes:
        """The next bytes, at most so many."""
        data = bytes(self._file.read(size_bytes))
        self._size_bytes += len(data)
        allowed = max(FREE_GROWTH_BYTES, MAX_GROWTH * self._packed.size_bytes)
        if self._size_bytes > allowed:
            raise DecompressionBomb(
                f"decompression bomb: {self._packed.size_bytes} bytes unpack to more than {allowed}"
            )
        return data

    def hexdigest(self) -> str:
        """Hex SHA-256 of the packed stream."""
        return self._packed.hexdigest()


class _Stepwise:
    """Streams one after the other, unpacked by a decompressor of the standard library."""

    def __init__(self, packed: Hashed, make: Callable[[], Any]) -> None:
        self._packed, self._make = packed, make
        self._decompressor = make()

    def read(self, size_bytes: int, /) -> bytes:
        while True:
            decompressor = self._decompressor
            data = b""
            if decompressor.eof:
                # Padding of zeros may stand between two streams, and at the end; of any length.
                rest = decompressor.unused_data.lstrip(b"\0")
                while not rest:
                    packed = self._packed.read(_CHUNK_BYTES)
                    if not packed:
                        return b""
                    rest = packed.lstrip(b"\0")
                self._decompressor = decompressor = self._make()
                data = decompressor.decompress(rest, size_bytes)
            elif decompressor.needs_input:
                packed = self._packed.read(_CHUNK_BYTES)
                if not packed:
                    raise EOFError("the compressed stream ends before its end")
                data = decompressor.decompress(packed, size_bytes)
            else:
                data = decompressor.decompress(b"", size_bytes)
            if data:
                return bytes(data)


def _zstd(packed: Hashed) -> _Readable:
    # pyarrow is there already and has it; the standard library has it from Python 3.14 on.
    import pyarrow as pa

    return cast("_Readable", pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd"))


_OPENERS: dict[str, Callable[[Hashed], _Readable]] = {
    "gzip": lambda packed: gzip.GzipFile(fileobj=cast("IO[bytes]", packed)),
    "bzip2": lambda packed: _Stepwise(packed, bz2.BZ2Decompressor),
    "xz": lambda packed: _Stepwise(
        packed, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)
    ),
    "zstd": _zstd,
}
