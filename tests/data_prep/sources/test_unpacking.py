"""What comes out of a compressed stream is what went in, however it was packed."""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable

import pytest

from data_prep.sources.unpacking import Unpacked


def unpacked(packed: bytes, compression: str) -> bytes:
    stream = Unpacked(io.BytesIO(packed), compression)
    return b"".join(iter(lambda: stream.read(1000), b""))


@pytest.mark.parametrize(("compression", "pack"), [("xz", lzma.compress), ("bzip2", bz2.compress)])
@pytest.mark.parametrize("padding_bytes", [0, 4, 2**20, 3 * 2**20 + 4])
def test_streams_one_after_the_other_are_read_over_any_padding(
    compression: str, pack: Callable[[bytes], bytes], padding_bytes: int
) -> None:
    padding = bytes(padding_bytes)
    packed = padding.join([pack(b"first" * 100), pack(b"second" * 100), b""])
    assert unpacked(packed, compression) == b"first" * 100 + b"second" * 100
