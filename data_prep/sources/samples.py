"""Shards in, samples out: members grouped by key, whatever state the shard is in; tars written.

A shard is a tar or a folder of loose files (`data_prep.sources.archive`). Panda-70M's oddities are
met here: a failed download is a json without an mp4, and scores are strings that hold Python
literals. Knows nothing of what is made of a sample, and nothing of Ray.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.archive import Archive, open_archive
from data_prep.sources.config import IMAGE_SUFFIXES, METADATA_SUFFIX, SourceConfig
from data_prep.sources.listing import Listing, Member, ShardError, is_harmless
from data_prep.storage.location import failing
from flowreel.files import replacing

TEXT_BYTES = 1 << 20
"""Most bytes that are read of a caption or of a json."""
_USUAL = SourceConfig()
_LITERAL_CHARS = 100_000
_WORD = re.compile(r"[a-z0-9_-]{1,40}")
_FORMAT_PART = re.compile(r"(.+)\.f\d{1,4}")
"""What yt-dlp calls one format of a video while it puts them together."""
_LITERAL_KEYS = (
    "matching_score", "desirable_filtering", "shot_boundary_detection", "clips", "timestamp"
)  # fmt: skip


@dataclass
class Sample:
    """One sample of a shard. `problem` is a reason code if it cannot go on, else empty."""

    key: str
    number: int
    """Its place in the shard, from 0."""
    media: bytes = b""
    suffix: str = ""
    """Suffix of the media, lower case, without the dot; empty where there is none."""
    caption: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    detail: str = ""
    note: str = ""
    """What was odd about a sample that goes on all the same."""

    @property
    def is_image(self) -> bool:
        return self.suffix in IMAGE_SUFFIXES


@dataclass
class ShardSummary:
    """Filled while a shard is read; complete when the reader is exhausted."""

    num_samples: int = 0
    truncated: bool = False
    ignored_members: int = 0
    """Links, devices, sparse files, names that climb or are absolute, hidden files."""
    error: str = ""
    """Why nothing, or nothing more, could be read, where that is so."""
    sha256: str = ""
    """Hex SHA-256 of the shard's whole content."""
    unjudged: dict[str, int] = field(default_factory=dict)
    """See `Manifest.unjudged`; filled by whoever knows the filters."""


@dataclass
class Group:
    """The members of one sample, by suffix."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)


def read_shard(
    source: str,
    *,
    max_media_bytes: int = 512 * 2**20,
    summary: ShardSummary | None = None,
    config: SourceConfig = _USUAL,
    archive: Archive | None = None,
) -> Iterator[Sample]:
    """The samples of a tar or folder, numbered from 0; never raises on what is in it.

    Samples come in the order of their first members, wherever the others lie (`group_members` says
    which belong together). Where a tar ends too early, the sample that the cut went through has
    the problem `truncated_shard` and `summary.truncated` is set.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "00000.tar"
    >>> write_shard(path, [{"__key__": "a", "mp4": b"...", "txt": "A car."}])
    >>> [(sample.key, sample.suffix, sample.caption) for sample in read_shard(str(path))]
    [('a', 'mp4', 'A car.')]

    Args:
        source: path of a tar or folder, or URI of a tar.
        max_media_bytes: media over this many bytes are never read: problem `video_too_large`.
        summary: filled as a side effect.
        config: which members are media and captions.
        archive: the shard, where it is open already; it is closed at the end.

    Raises:
        ShardError: the shard cannot be opened.
    """
    summary = summary if summary is not None else ShardSummary()
    archive = archive if archive is not None else open_archive(source)
    try:
        listing = archive.listing()
        summary.truncated, summary.error = listing.truncated, listing.error
        members = without_leftovers(listing.members, config)
        summary.ignored_members = listing.ignored + len(listing.members) - len(members)
        earlier_keys: set[str] = set()
        for group in group_members(members, config):
            sample = _read_sample(archive, group, summary.num_samples, max_media_bytes, config)
            summary.num_samples += 1
            _find_problem(sample, group, listing, earlier_keys)
            earlier_keys.add(group.key)
            yield sample
            summary.truncated = summary.truncated or sample.problem == "truncated_shard"
        summary.sha256 = archive.content_sha256()
    finally:
        archive.close()


def group_members(members: Sequence[Member], config: SourceConfig = _USUAL) -> list[Group]:
    """Members by sample, in the order of each sample's first member.

    A key is a member's path without its last suffix, so that keys may hold dots. A member that is
    no media goes to the sample with media whose key its name begins with, the longest such key
    (`a.txt` and `a.frames.npy` go to `a.mp4`). Captions and metadata of a key that has several
    videos (`a.txt` of `a.left.mp4` and `a.right.mp4`) go to each of them that has none of its own.
    Captions and metadata without media make a sample by themselves. A second member of the same
    name begins a second sample of that key.

    >>> [(g.key, sorted(g.members)) for g in group_members([
    ...     Member("a.b.mp4", 1, 0), Member("c.txt", 1, 0), Member("a.b.txt", 1, 0)])]
    [('a.b', ['mp4', 'txt']), ('c', ['txt'])]
    """
    media, texts = set(), set()
    for member in members:
        stem, _, suffix = member.name.rpartition(".")
        if suffix.lower() in config.media_suffixes:
            media.add(stem)
        elif suffix.lower() in config.text_suffixes:
            texts.add(stem)
    groups: list[Group] = []
    latest: dict[str, Group] = {}
    for member in members:
        key, suffix = _split_name(member.name, media, texts, config)
        group = latest.get(key)
        if group is None or suffix in group.members:
            group = latest[key] = Group(_clean(key).removeprefix("./"))
            groups.append(group)
        group.members[suffix] = member
    return _with_shared_texts(groups, config)


def _with_shared_texts(groups: list[Group], config: SourceConfig) -> list[Group]:
    """Texts of a key without media, handed to the samples whose keys go on from it."""
    heirs: dict[str, list[Group]] = {}
    for group in groups:
        if _has_media(group, config):
            folder, slash, base = group.key.rpartition("/")
            parts = base.split(".")
            for count in range(1, len(parts)):
                heirs.setdefault(folder + slash + ".".join(parts[:count]), []).append(group)
    samples = []
    for group in groups:
        own = [] if _has_media(group, config) else heirs.get(group.key, [])
        for heir in own:
            heir.members = {**group.members, **heir.members}
        if not own:
            samples.append(group)
    return samples


def _has_media(group: Group, config: SourceConfig) -> bool:
    return any(suffix in config.media_suffixes for suffix in group.members)


def without_leftovers(members: Sequence[Member], config: SourceConfig = _USUAL) -> list[Member]:
    """Members but for what a downloader left of one: `a.f230.mp4`, a format of `a.mp4`.

    Alone, without the file that it was to become a part of, it is the video.

    >>> names = ("a.f230.mp4", "a.mp4", "b.f137.mp4")
    >>> [member.name for member in without_leftovers([Member(name, 1, 0) for name in names])]
    ['a.mp4', 'b.f137.mp4']
    """

    def is_media(name: str) -> bool:
        return name.rpartition(".")[2].lower() in config.media_suffixes

    stems = {member.name.rpartition(".")[0] for member in members if is_media(member.name)}

    def is_left_over(name: str) -> bool:
        part = _FORMAT_PART.fullmatch(name.rpartition(".")[0])
        return is_media(name) and part is not None and part[1] in stems

    return [member for member in members if not is_left_over(member.name)]


def _split_name(
    name: str, media: set[str], texts: set[str], config: SourceConfig
) -> tuple[str, str]:
    """Key and suffix of a member, given the stems of all media and of all texts."""
    stem, _, suffix = name.rpartition(".")
    if suffix.lower() in config.media_suffixes:
        return stem, suffix.lower()
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    stems = [folder + slash + ".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    owner = next((s for s in stems if s in media), None)
    owner = owner or next((s for s in reversed(stems) if s in texts), None)
    key = owner or folder + slash + parts[0]
    return key, name[len(key) + 1 :].lower()


def _read_sample(
    archive: Archive, group: Group, number: int, max_media_bytes: int, config: SourceConfig
) -> Sample:
    """The sample of a group, in the order in which its members lie."""
    sample = Sample(_clean(group.key), number)
    sample.suffix = next((s for s in config.media_suffixes if s in group.members), "")
    texts: dict[str, bytes] = {}
    for suffix, member in sorted(group.members.items(), key=lambda item: item[1].offset):
        if suffix == sample.suffix:
            data = archive.read(member, max_media_bytes)
            if data is None:
                sample.problem = "video_too_large"
                sample.detail = f"{member.size_bytes} bytes, over the cap of {max_media_bytes}"
            sample.media = data or b""
        elif suffix in config.text_suffixes:
            data = archive.read(member, TEXT_BYTES)
            if data is None:
                sample.note = f"{suffix}: {member.size_bytes} bytes not read, over {TEXT_BYTES}"
            texts[suffix] = data or b""
        else:
            continue
        if data is not None and len(data) < member.size_bytes:
            sample.problem = "truncated_shard"
    sample.metadata = parse_metadata(texts.get(METADATA_SUFFIX, b""))
    captions = (decode_text(texts.get(suffix, b"")) for suffix in config.caption_suffixes)
    text = next(filter(None, captions), "") or config.caption_in(sample.metadata)
    sample.caption = plain_caption(text)
    return sample


def _find_problem(sample: Sample, group: Group, listing: Listing, earlier_keys: set[str]) -> None:
    """Set the first problem that stands in the sample's way."""
    if listing.truncated and listing.members[-1] in group.members.values():
        sample.problem = "truncated_shard"
    if sample.problem == "truncated_shard":
        sample.detail = "the shard ends before this sample does"
    elif sample.problem:
        pass
    elif group.key in earlier_keys:
        sample.problem = "duplicate_key"
        sample.detail = "an earlier sample of this shard has the same key"
    elif not sample.suffix:
        status = str(sample.metadata.get("status", ""))
        # A json may say anything: only what looks like a downloader's word becomes a reason.
        is_a_word = status != "success" and _WORD.fullmatch(status) is not None
        sample.problem = status if is_a_word else "no_media"
        nothing = f"no video or image member, only {', '.join(group.members)}"
        message = str(sample.metadata.get("error_message") or nothing)
        sample.detail = message[:300]
    if sample.problem:
        sample.media = b""


def decode_text(data: bytes) -> str:
    """The text of a caption file: UTF-8 or UTF-16 by its mark, UTF-8, else Windows-1252.

    >>> decode_text("Café".encode()) == decode_text("Café".encode("cp1252")) == "Café"
    True
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace").strip()
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace").strip()


def _clean(text: str) -> str:
    r"""Text without lone surrogates, as which bytes of names that are not UTF-8 arrive.

    No file format here can hold them. Such names are read as captions of that kind are, as
    Windows-1252, so that different names stay different.

    >>> _clean(b"caf\xe9".decode("utf-8", "surrogateescape")) == "café"
    True
    """
    try:
        return decode_text(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")


def parse_metadata(data: bytes) -> dict[str, Any]:
    """A sample's json; scores that Panda-70M writes as Python literals become values.

    What cannot be read is left out, so that the policy for missing metadata decides.

    >>> parse_metadata(b'{"matching_score": "[0.44]"}')
    {'matching_score': [0.44]}
    """
    try:
        values = json.loads(decode_text(data)) if data else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    for key in _LITERAL_KEYS:
        if isinstance(values.get(key), str):
            values[key] = read_literal(values[key])
    return values


def read_literal(text: str) -> Any:
    """The value of a Python literal, or the text itself where it is none; no code is run.

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
    """A caption, or the first one of a list of captions that was written as a string.

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
    """Write samples as a tar, whole or not at all; the same samples give the same bytes.

    Args:
        path: the tar to write; one that stands is replaced.
        samples: dicts of `__key__` and members by suffix: `txt` is a str, `json` any JSON value,
            media are bytes.

    Raises:
        ShardError: a key that would not come back as it is.
        StorageError: the disk fails.
    """
    import webdataset

    with (
        failing("write", path),
        replacing(Path(path)) as partial,
        partial.open("wb") as file,
        webdataset.TarWriter(file, mtime=0.0, compress=False) as writer,
    ):
        for sample in samples:
            key = sample.get("__key__", "")
            if not key or "." in key.rpartition("/")[2] or not is_harmless(key):
                raise ShardError(
                    f"sample key {key!r}: a key has a base name without dots, no '..' "
                    "and no leading '/'"
                )
            writer.write(sample)
