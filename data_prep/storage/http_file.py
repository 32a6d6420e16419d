"""One file behind an HTTP address, read to the exact byte over a network that fails.

A connection that is cut goes on at the byte where it was cut. A file that changed meanwhile is an
error, and so is one whose length the server does not say: nothing ends early in silence. What a
server may make us do, and how long it is waited for, is in `data_prep.storage.http_request`. Knows
nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from data_prep.storage import http_request
from data_prep.storage.http_request import (
    Address,
    PassingFailure,
    Patience,
    ask,
    network_failures,
)
from data_prep.storage.uris import StorageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_FILE_BYTES = 2**40
"""What says that it is longer is no shard."""
PROGRESS_BYTES = 1 << 16
"""A connection that brings less does not count as one that works; nor does one that brings less in
`http_request.SILENCE_S` seconds in which it is waited for."""
_SKIP_BYTES = 1 << 20
"""A gap of fewer bytes is read over; beyond it, the bytes after the gap are asked for."""
PART_BYTES = 1 << 17
"""Read at once where a file is read here and there: a header with the small files around it."""
_FIRST_BYTES = 1 << 16
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


@dataclass
class _Body:
    """The bytes of one answer: `rest` lies at `at`, and what comes goes up to `end`."""

    response: httpx.Response
    chunks: Iterator[bytes]
    at: int
    end: int
    size_bytes: int
    """Of the whole file."""
    version: str
    rest: bytes = b""
    waited_s: float = 0.0
    waited_for_bytes: int = 0

    def advance(self) -> None:
        """Go on to the next bytes. Raises PassingFailure where the answer ends early or trickles.

        Only the time that is waited for counts: between two reads the caller may take its own.
        """
        self.at += len(self.rest)
        begun_s = time.monotonic()
        self.rest = next(self.chunks, b"")
        self.waited_s += time.monotonic() - begun_s
        self.waited_for_bytes += len(self.rest)
        if not self.rest:
            raise PassingFailure("the answer ended early")
        if self.waited_s > http_request.SILENCE_S:
            if self.waited_for_bytes < PROGRESS_BYTES:
                raise PassingFailure(f"{self.waited_for_bytes} bytes came in {self.waited_s:.0f} s")
            self.waited_s, self.waited_for_bytes = 0.0, 0


class HttpFile(io.RawIOBase):
    """The file at an address, for reading.

    Args:
        address: where it is.
        seekable: for reading here and there: each request is for the bytes of a read, so that the
            connection can be used again. Otherwise one answer is read front to back.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the server refuses it, fails for long, or does not say how long the file is;
            from a later `read` also if the file changed or went away.
    """

    def __init__(self, address: Address, *, seekable: bool = False) -> None:
        super().__init__()
        self.address = address
        self._in_parts = seekable
        self._place = 0
        self._body: _Body | None = None
        self._via = ""
        """Where it redirected to."""
        self._tag = ""
        self._patience = Patience(address)
        self._progress_bytes = 0
        self._size_bytes: int | None = None
        self._version = ""
        # So that a file that is not there is told on opening.
        self._first = self._pull(_FIRST_BYTES)

    @property
    def version(self) -> str:
        """What tells the file from another in its place: its size, and its etag or time."""
        return f"size:{self._size_bytes} {self._version}".strip()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere; the server is asked at the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size_bytes or 0}
        place = base[whence] + offset
        if place < 0:
            raise ValueError(f"place {place} is before the start of the file")
        self._place = place
        return place

    def read(self, size_bytes: int | None = -1) -> bytes:
        """So many bytes, or all that are left; fewer only at the end."""
        left = sys.maxsize if size_bytes is None or size_bytes < 0 else size_bytes
        pieces: list[bytes] = []
        while left and (piece := self._next(left)):
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def _next(self, at_most: int) -> bytes:
        """The bytes that are at hand, or else the next that come; none at the end."""
        data = self._first[self._place :][:at_most] or self._pull(at_most)
        self._place += len(data)
        return data

    def close(self) -> None:
        self._leave()
        super().close()

    def _leave(self) -> None:
        """Let go of an answer that works; what is left of it is read, unless it is much.

        After its end the connection is free for the next request.
        """
        body = self._body
        if body is not None and body.end - body.at - len(body.rest) <= PART_BYTES:
            late_s = time.monotonic() + 1.0
            # Nobody waits for these bytes, so that a failure here is of no matter.
            with contextlib.suppress(httpx.TransportError):
                while next(body.chunks, b"") and time.monotonic() < late_s:
                    pass
        self._let_go()

    def _let_go(self) -> None:
        if self._body is not None:
            self._body.response.close()
        self._body = None

    def _pull(self, at_most: int) -> bytes:
        """Bytes at `_place`, none only at the file's end, over as many requests as it takes."""
        if self._size_bytes is not None and self._place >= self._size_bytes:
            return b""
        while True:
            try:
                with network_failures(self.address):
                    data = self._take(at_most)
            except PassingFailure as failure:
                self._let_go()
                self._via, self._progress_bytes = "", 0
                self._patience.pause(failure, self._place)
                continue
            except FileNotFoundError:
                if self._size_bytes is None:
                    raise
                raise StorageError(
                    f"{self.address.shown} went away while it was read, at byte {self._place}; "
                    "see where it is, then run the same command again"
                ) from None
            self._progress_bytes += len(data)
            if self._progress_bytes >= PROGRESS_BYTES:
                self._patience.failures = 0
            return data

    def _take(self, at_most: int) -> bytes:
        """The bytes at `_place` that come next, of the answer at hand or of a new one."""
        body = self._body
        if body is None or not body.at <= self._place < body.end or self._is_far(body):
            self._leave()
            body = self._body = self._ask(at_most)
            self._check(body)
        if self._place >= body.end:
            return b""
        while body.at + len(body.rest) <= self._place:
            body.advance()
        data = body.rest[self._place - body.at :][:at_most]
        if self._place + len(data) >= body.end:
            self._leave()
        return data

    def _is_far(self, body: _Body) -> bool:
        """Whether to skip to the place takes longer than to ask for it."""
        has_ranges = body.response.status_code == 206
        return has_ranges and self._place - body.at > len(body.rest) + _SKIP_BYTES

    def _ask(self, at_most: int) -> _Body:
        end = f"{self._place + at_most - 1}" if self._in_parts else ""
        headers = {"range": f"bytes={self._place}-{end}"}
        response, url = ask(self.address, headers, self._via)
        self._tag = response.headers.get("x-linked-etag", "") or self._tag
        self._via = url if url != self.address.url else ""
        try:
            return self._body_of(response)
        except BaseException:
            response.close()
            raise

    def _body_of(self, response: httpx.Response) -> _Body:
        """An answer's bytes, if it says which of how many they are."""
        headers, chunks = response.headers, response.iter_raw()
        where = _RANGE.fullmatch(headers.get("content-range", ""))
        version = version_of(headers, self._tag)
        if response.status_code == 206 and where is not None and where[1] is not None:
            first, last, size_bytes = int(where[1]), int(where[2]), int(where[3])
            if not first <= self._place <= last < size_bytes:
                raise PassingFailure(f"asked for byte {self._place}, the server sent {where[0]}")
            return _Body(response, chunks, first, last + 1, size_bytes, version)
        if response.status_code == 416 and where is not None:
            # An empty file has no first byte; nothing else is asked for beyond a file's end.
            if int(where[3]) > self._place:
                raise PassingFailure(f"asked for byte {self._place}, the server has {where[0]}")
            return _Body(response, chunks, 0, 0, int(where[3]), version)
        if response.status_code == 200 and headers.get("content-length", "").isdigit():
            # A server without ranges sends all, of which the first part is skipped.
            size_bytes = int(headers["content-length"])
            return _Body(response, chunks, 0, size_bytes, size_bytes, version)
        raise StorageError(
            f"{self.address.shown}: the server does not say how long the file is, so that a cut "
            "would look like its end; download it and give its path"
        )

    def _check(self, body: _Body) -> None:
        """Hold an answer against the first one."""
        if self._size_bytes is None:
            if body.size_bytes > MAX_FILE_BYTES:
                raise StorageError(
                    f"{self.address.shown} has {body.size_bytes} bytes; a shard has at most "
                    f"{MAX_FILE_BYTES}: give it in parts"
                )
            self._size_bytes, self._version = body.size_bytes, body.version
        elif (self._size_bytes, self._version) != (body.size_bytes, body.version):
            raise StorageError(
                f"{self.address.shown} changed while it was read, at byte {self._place}; run the "
                "same command again"
            )


def version_of(headers: Any, tag: str) -> str:
    """A file's etag, else the time when it was modified, else nothing, as its server says.

    >>> version_of({"etag": 'W/"a1"'}, ""), version_of({"etag": '"a1"'}, '"of the file"')
    ('etag:a1', 'etag:of the file')
    """
    if found := tag or headers.get("etag", ""):
        return f"etag:{found.removeprefix('W/').strip(chr(34))}"
    modified = headers.get("last-modified", "")
    return f"modified:{modified}" if modified else ""
