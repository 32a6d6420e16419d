"""Kinds of places: which locations are URIs, of a store or of the web, and how they are shown.

    StorageError(FlowreelError, RuntimeError)   a disk, a store or a server failed, or refuses

A StorageError is never an OSError, so that nobody takes it for a fault of the file's content. Knows
nothing of files.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from flowreel.errors import FlowreelError

Location = str | os.PathLike[str]
"""A local path or a URI."""

WEB_SCHEMES = ("https", "http", "hf")
"""What is read file by file, and neither listed as a store is nor written."""
_STORE_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")


class StorageError(FlowreelError, RuntimeError):
    """A disk, a store or a server failed; the files that were finished before are whole."""


def is_uri(location: Location) -> bool:
    """Whether a location is a URI other than of a local file."""
    return "://" in str(location) and not str(location).startswith("file://")


def shown(location: Location) -> str:
    """A location without a URI's options, for manifests and messages.

    >>> shown("s3://bucket/a.tar?endpoint_override=http://h:9000")
    's3://bucket/a.tar'
    """
    text = str(location)
    if not is_uri(text):
        return text
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def is_web(location: Location) -> bool:
    """Whether a location is of the web: `https://`, `http://` or `hf://`.

    >>> is_web("https://host/a.tar"), is_web("s3://bucket/a.tar"), is_web("/data/a.tar")
    (True, False, False)
    """
    return is_uri(location) and urlsplit(str(location)).scheme in WEB_SCHEMES


def check_scheme(location: Location) -> None:
    """Hold the kind of a place against those that are known. Raises StorageError.

    >>> check_scheme("ftp://host/a.tar")
    Traceback (most recent call last):
    ...
    data_prep.storage.uris.StorageError: ftp://host/a.tar: ftp:// is not read; give a local \
path, or a URI of s3://, gs://, abfs://, hdfs://, https:// or hf://datasets/
    """
    scheme = urlsplit(str(location)).scheme
    if is_uri(location) and scheme not in (*WEB_SCHEMES, *_STORE_SCHEMES):
        raise StorageError(
            f"{shown(location)}: {scheme}:// is not read; give a local path, or a URI of s3://, "
            "gs://, abfs://, hdfs://, https:// or hf://datasets/"
        )


def check_folder(location: Location) -> None:
    """Hold a place of many files, such as an output, against what can be one.

    >>> check_folder("s3://bucket/latents")
    >>> check_folder("hf://datasets/owner/name")
    Traceback (most recent call last):
    ...
    data_prep.storage.uris.StorageError: hf://datasets/owner/name: from the web only shards \
are read; give a local folder or an s3:// URI

    Raises:
        StorageError: it is of the web, or of an unknown kind.
    """
    check_scheme(location)
    if is_web(location):
        raise StorageError(
            f"{shown(location)}: from the web only shards are read; give a local folder or an "
            "s3:// URI"
        )


def recorded(location: Location) -> str:
    """A location as manifests keep it: where it may hold a secret, without its query.

    A store's options stay, without which it would not be found again.

    >>> recorded("https://host/a.tar?signature=x"), recorded("s3://b/a.tar?region=x")
    ('https://host/a.tar', 's3://b/a.tar?region=x')
    """
    return shown(location) if is_web(location) else str(location)
