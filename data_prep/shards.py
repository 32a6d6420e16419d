"""WebDataset tars in and out: samples grouped by key, whatever state the tar is in.

The reader streams, so a tar cut short gives every sample before the cut; nothing is ever extracted
to disk. Knows where Panda-70M hides things (a failed download is a json without an mp4; scores are
strings holding Python literals) but not what is made of a sample. Knows nothing of Ray.

    ShardError(ValueError)     a shard that cannot be opened at all, or cannot be written
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from data_prep.locations import open_stream, shown

VIDEO_SUFFIXES = ("mp4", "mov", "mkv", "webm", "avi", "m4v")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_TEXT_BYTES = 1 << 20
_LITERAL_CHARS = 100_000
_LITERAL_KEYS = ("matching_score", "desirable_filtering", "shot_boundary_detection", "clips")


_TRUNCATED_HEADER = tarfile.TruncatedHeaderError  # type: ignore[attr-defined]
_INVALID_HEADER = tarfile.InvalidHeaderError  # type: ignore[attr-defined]


class ShardError(ValueError):
    """A shard that cannot be opened or written."""

    reason = "unreadable_shard"


@dataclass
class Sample:
    """One sample of a shard. `problem` is a reason code when it cannot go on, else empty."""

    key: str
    number: int
    media: bytes = b""
    suffix: str = ""
    """Of the media, lower case, without the dot; empty where there is none."""
    caption: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    detail: str = ""

    @property
    def is_image(self) -> bool:
        return self.suffix in IMAGE_SUFFIXES


@dataclass
class ShardSummary:
    """Filled while a shard is read; complete when the reader is exhausted."""

    num_samples: int = 0
    truncated: bool = False
    ignored_members: int = 0
    """Links, devices, sparse files, names that climb or are absolute."""
    error: str = ""
    """Why nothing could be read, where that is so."""
    sha256: str = ""
    """Of the shard's whole content."""


def open_shard(source: str) -> IO[bytes]:
    """Open a local path or any URI that pyarrow knows (s3://, gs://, file://) for streaming.

    Raises:
        ShardError: it is not there.
        StorageError: the disk or store fails, now or while it is read: no fault of the shard's.
    """
    try:
        return open_stream(source)
    except (FileNotFoundError, ValueError) as error:
        raise ShardError(f"cannot open shard {shown(source)}: {error}") from error


def read_shard(
    source: str, *, max_media_bytes: int = 512 * 2**20, summary: ShardSummary | None = None
) -> Iterator[Sample]:
    """The samples of a tar in its order, numbered from 0; never raises on the tar's content.

    Members of one key must be neighbours, as WebDataset has it; the key is the member's path up to
    the first dot of its base name. Where the tar ends too early, the sample that the cut went
    through has the problem `truncated_shard` and `summary.truncated` is set.

    Args:
        source: path or URI.
        max_media_bytes: media over this many bytes are skipped: problem `video_too_large`.
        summary: filled as a side effect.

    Raises:
        ShardError: the shard cannot be opened.
    """
    summary = summary if summary is not None else ShardSummary()
    seen: set[str] = set()
    with open_shard(source) as opened:
        stream = _HashingStream(opened)
        group = _Group("")
        for key, suffix, size_bytes, data in _members(stream, max_media_bytes, summary):
            if key != group.key and group.members:
                yield _finish(group, seen, summary)
                group = _Group("")
            group.key = key
            group.add(suffix, size_bytes, data)
        if group.members:
            if summary.truncated:
                group.problem = ("truncated_shard", "the shard ends before this sample does")
            yield _finish(group, seen, summary)
        summary.sha256 = stream.hexdigest()


class _HashingStream:
    """A stream that hashes what is read from it, so that no second pass is needed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def read(self, size_bytes: int) -> bytes:
        data = self._stream.read(size_bytes)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        """Of the whole stream: what follows the archive's end is read too."""
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest()


class _Group:
    """Members of one key while they arrive."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, bytes] = {}
        self.problem = ("", "")

    def add(self, suffix: str, size_bytes: int, data: bytes | None) -> None:
        """Take one member (data None: over its cap). The first of a suffix stands."""
        if suffix in self.members:
            return
        self.members[suffix] = data or b""
        if data is None and suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
            self.problem = ("video_too_large", f"{size_bytes} bytes, over the cap on media")


def _members(
    stream: _HashingStream, max_media_bytes: int, summary: ShardSummary
) -> Iterator[tuple[str, str, int, bytes | None]]:
    """(key, suffix, bytes, data) of every regular member, until the end or the cut.

    Data is None over the cap. The member that the cut goes through comes last, without data.
    """
    first = True
    try:
        opened = cast("IO[bytes]", stream)
        with tarfile.open(fileobj=opened, mode="r|*", tarinfo=_watched_header(summary)) as tar:
            for member in tar:
                first = False
                # The list of past members would grow with the shard.
                tar.members = []  # type: ignore[attr-defined]
                # A sparse member may claim any size while holding a few bytes.
                if not member.isreg() or member.issparse() or not _harmless(member.name):
                    summary.ignored_members += not member.isdir()
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not stem:
                    summary.ignored_members += 1
                    continue
                key = _clean(f"{folder}/{stem}" if folder not in ("", ".") else stem)
                suffix = suffix.lower()
                try:
                    data = _read_member(tar, member, suffix, max_media_bytes)
                except tarfile.ReadError:
                    summary.truncated = True
                    yield key, suffix, member.size, b""
                    return
                yield key, suffix, member.size, data
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if first:
            summary.error, summary.truncated = f"not a readable tar: {error}", False
        else:
            summary.truncated = True


def _watched_header(summary: ShardSummary) -> type[tarfile.TarInfo]:
    """A header class that tells a cut or damaged header, at which tarfile silently stops."""

    class Header(tarfile.TarInfo):
        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> Header:
            try:
                return super().fromtarfile(tar)
            except (_TRUNCATED_HEADER, _INVALID_HEADER):
                summary.truncated = True
                raise

    return Header


def _read_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, max_media_bytes: int
) -> bytes | None:
    """The whole member; None over its cap; empty for suffixes that nobody reads."""
    if suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        cap = max_media_bytes
    elif suffix in ("txt", "json"):
        cap = _TEXT_BYTES
    else:
        return b""
    file = tar.extractfile(member)
    if member.size > cap or file is None:
        return None
    data = file.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _harmless(name: str) -> bool:
    parts = name.split("/")
    return not name.startswith("/") and ".." not in parts and "\0" not in name


def _clean(text: str) -> str:
    """Names that are not UTF-8 arrive with lone surrogates, which no file format here can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _finish(group: _Group, seen: set[str], summary: ShardSummary) -> Sample:
    """The sample of a complete group, with the first problem found."""
    sample = Sample(group.key, summary.num_samples)
    summary.num_samples += 1
    sample.metadata = parse_metadata(group.members.get("json", b""))
    text = group.members.get("txt", b"").decode("utf-8", "replace").strip()
    sample.caption = plain_caption(text or str(sample.metadata.get("caption") or ""))
    for suffix in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        if suffix in group.members:
            sample.suffix, sample.media = suffix, group.members[suffix]
            break
    sample.problem, sample.detail = group.problem
    if sample.problem:
        pass
    elif sample.key in seen:
        sample.problem = "duplicate_key"
        sample.detail = "an earlier sample of this shard has the same key"
    elif not sample.suffix:
        status = str(sample.metadata.get("status", ""))
        downloaded = status in ("", "success")
        sample.problem = "no_media" if downloaded else status[:64]
        sample.detail = str(sample.metadata.get("error_message") or "no video or image member")[
            :300
        ]
    if sample.problem:
        sample.media = b""
    seen.add(sample.key)
    return sample


def parse_metadata(data: bytes) -> dict[str, Any]:
    """A sample's json; scores that Panda-70M writes as Python literals become values.

    Anything unreadable is left out, so that the missing-metadata policy decides.
    """
    try:
        values = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    for key in _LITERAL_KEYS:
        if isinstance(values.get(key), str):
            values[key] = read_literal(values[key])
    return values


def read_literal(text: str) -> Any:
    """The value of a Python literal, or the text itself where it is none (never evaluated).

    >>> read_literal("[0.44, 0.5]"), read_literal("desirable")
    ([0.44, 0.5], 'desirable')
    """
    if len(text) > _LITERAL_CHARS:
        return text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def plain_caption(text: str) -> str:
    """A caption, or the first of a stringified list of captions.

    >>> plain_caption("['A car.', 'A road.']")
    'A car.'
    """
    text = _clean(text).strip()
    if text.startswith("[") and text.endswith("]"):
        values = read_literal(text)
        if isinstance(values, list) and values and all(isinstance(v, str) for v in values):
            return values[0].strip()
    return text


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples with the webdataset library; same samples, same bytes. Replaces atomically.

    Args:
        path: the tar to write.
        samples: dicts of `__key__` and members by suffix; `txt` a str, `json` any JSON value,
            media bytes.

    Raises:
        ShardError: a key with a dot or slash at fault, or a member that cannot be encoded.
    """
    import webdataset

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            with webdataset.TarWriter(file, mtime=0.0, compress=False) as writer:
                for sample in samples:
                    key = sample.get("__key__", "")
                    if not key or "." in key.rpartition("/")[2] or not _harmless(key):
                        raise ShardError(
                            f"sample key {key!r}: a key has a base name without dots, no '..' "
                            "and no leading '/'"
                        )
                    writer.write(sample)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
