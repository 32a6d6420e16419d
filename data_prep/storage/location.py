"""Where files lie: local paths and URIs of object stores, and what it means when either fails.

    open_stream("s3://bucket/00000.tar")     opens one file, to be read front to back
    file_version("s3://bucket/00000.tar")    tells a file from another one in its place

A store's endpoint, region and credentials are those of the standard AWS variables. Endpoint and
region may also be in the URI: `s3://b/k?endpoint_override=http://host:9000&region=x`. Files of the
web, `https://` and `hf://`, are read and never written (`data_prep.storage.web`). Knows nothing of
what the files hold.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlsplit

from data_prep.storage.uris import Location, StorageError, check_folder, is_uri, is_web, shown

if TYPE_CHECKING:
    from pyarrow import fs

READ_AHEAD_BYTES = 8 * 2**20
"""How much of a store's file is held in memory while it is read front to back."""
_STORE_ATTEMPTS = 7
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def absolute(location: Location) -> str:
    """A local path made absolute (workers have other working folders); URIs stay.

    >>> absolute("s3://bucket/a"), absolute("/data/a")
    ('s3://bucket/a', '/data/a')
    """
    text = str(location)
    if is_uri(text):
        return text
    return str(Path(text.removeprefix("file://")).absolute())


@contextmanager
def failing(action: str, location: Location) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what to do; a missing file stays as it is.

    >>> with failing("write", "/data/a"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    ...
    data_prep.storage.uris.StorageError: cannot write /data/a: No space left on device; free \
some space, then run the same command again: what is finished is kept
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        where = shown(location)
        why = " ".join(str(error.strerror or error).split())[:300]
        if error.errno in _FULL:
            advice = "free some space"
        elif is_uri(location):
            advice = "see that the store answers and that the credentials may do this"
        else:
            advice = "see to the disk"
        raise StorageError(
            f"cannot {action} {where}: {why}; {advice}, then run the same command again: "
            "what is finished is kept"
        ) from error


@lru_cache(maxsize=64)
def _s3(endpoint: str, region: str) -> fs.S3FileSystem:
    from pyarrow import fs

    options: dict[str, Any] = {}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    if region:
        options["region"] = region
    return fs.S3FileSystem(
        **options,
        connect_timeout=5.0,
        request_timeout=30.0,
        # With this a small file is one PUT, not a multipart upload of one part.
        allow_delayed_open=True,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_STORE_ATTEMPTS),
    )


def filesystem_of(location: Location) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a location, and its path there.

    Raises:
        ValueError: a URI that pyarrow does not understand.
        StorageError: credentials in the URI, or a scheme that it is not for.
    """
    from pyarrow import fs

    text = absolute(location)
    if not is_uri(text):
        return fs.LocalFileSystem(), text
    check_folder(text)
    parts = urlsplit(text)
    if parts.scheme != "s3":
        filesystem, path = fs.FileSystem.from_uri(text)
        return filesystem, path
    query = dict(parse_qsl(parts.query))
    if "@" in parts.netloc:
        # The URI is written into manifests and logs, where a secret must not be.
        raise StorageError(
            f"the URI of {shown(text)} holds credentials; give them as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or in ~/.aws"
        )
    environment = os.environ.get
    endpoint = (
        query.get("endpoint_override")
        or environment("AWS_ENDPOINT_URL_S3")
        or environment("AWS_ENDPOINT_URL")
        or ""
    )
    if "scheme" in query and "://" not in endpoint:
        endpoint = f"{query['scheme']}://{endpoint}"
    region = query.get("region") or environment("AWS_REGION") or environment("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        with failing("find the region of", text):
            region = fs.resolve_s3_region(parts.netloc)
    path = f"{parts.netloc}{parts.path}".rstrip("/")
    return _s3(endpoint, region or ""), path


class _Stream:
    """A file for reading; a read that fails is a StorageError."""

    def __init__(self, location: str, stream: Any) -> None:
        self._location = location
        self._stream = stream

    def read(self, size_bytes: int = -1) -> bytes:
        with failing("read", self._location):
            data: bytes = self._stream.read(size_bytes) if size_bytes >= 0 else self._stream.read()
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        # A seek asks nothing of the disk or store: what fails here is an impossible place.
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_stream(location: Location, *, seekable: bool = False) -> IO[bytes]:
    """Open a file for reading.

    Args:
        location: a local path or a URI.
        seekable: for reading here and there. Otherwise the file is read once, front to back, and
            `READ_AHEAD_BYTES` of a store's file are held at a time.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the disk or store fails, now or in a later `read`.
    """
    text = absolute(location)
    with failing("open", text):
        if not is_uri(text):
            stream: Any = open(text, "rb")  # noqa: SIM115 (closed by the caller)
        elif is_web(text):
            from data_prep.storage.web import open_web

            stream = open_web(text, seekable=seekable)
        else:
            filesystem, path = filesystem_of(text)
            if seekable:
                # So that a header and the small files around it come in one request.
                stream = io.BufferedReader(filesystem.open_input_file(path), 1 << 17)
            else:
                stream = filesystem.open_input_stream(path, buffer_size=READ_AHEAD_BYTES)
    return cast("IO[bytes]", _Stream(text, stream))


def file_version(location: Location) -> str:
    """What tells a file from another one that takes its place.

    It is the size and the modification time, or the etag where a store gives one: a store's times
    are whole seconds, in which a file may change unseen.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the disk or store fails.
    """
    text = absolute(location)
    with failing("look at", text):
        if not is_uri(text):
            about = os.stat(text)
            return f"size:{about.st_size} mtime_ns:{about.st_mtime_ns}"
        if is_web(text):
            from data_prep.storage.web import web_version

            return web_version(text)
        return version_in_store(*filesystem_of(text))


def version_in_store(filesystem: fs.FileSystem, path: str) -> str:
    """`file_version` of a store's file. Raises FileNotFoundError, OSError."""
    with filesystem.open_input_file(path) as file:
        size_bytes, etag = file.size(), file.metadata().get("ETag")
    if etag is not None:
        return f"size:{size_bytes} etag:{etag.decode().strip(chr(34))}"
    return f"size:{size_bytes} mtime_ns:{filesystem.get_file_info(path).mtime_ns}"
