"""Settings of what belongs to a sample: suffixes of files, fields of a json.

Knows nothing of how samples are read.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from data_prep.strict import Strict

VIDEO_SUFFIXES = ("mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg", "mpeg", "flv", "wmv")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
METADATA_SUFFIX = "json"
_SUFFIX = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


class SourceConfig(Strict):
    """Which files of a shard are media and captions, and where else a caption is looked for.

    >>> config = SourceConfig(caption_suffixes="caption", caption_fields=["text", "meta.title"])
    >>> config.caption_suffixes, config.caption_in({"meta": {"title": "A car."}})
    (('caption',), 'A car.')
    """

    caption_suffixes: tuple[str, ...] = Field(
        default=("txt",),
        max_length=16,
        description="Suffixes of caption files, without the dot, in lower case: of those that lie "
        "beside a medium, the first with any text is its caption. One, or a list.",
    )
    caption_fields: tuple[str, ...] = Field(
        default=("caption",),
        max_length=16,
        description="Fields of a sample's json that may hold its caption, where no caption file "
        "does: the first with any text counts. `a.b` is the field b of the object a. One, or a "
        "list.",
    )
    video_suffixes: tuple[str, ...] = Field(
        default=VIDEO_SUFFIXES,
        min_length=1,
        max_length=64,
        description="Suffixes of videos, without the dot, in lower case. What a file is, its "
        "first bytes say; a file of another suffix belongs to a sample and is not read.",
    )

    @field_validator("caption_suffixes", "caption_fields", "video_suffixes", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _each_suffix_means_one_thing(self) -> SourceConfig:
        suffixes = (*self.caption_suffixes, *self.video_suffixes, *IMAGE_SUFFIXES, METADATA_SUFFIX)
        for suffix in suffixes:
            if not _SUFFIX.fullmatch(suffix):
                raise ValueError(
                    f"source: {suffix!r} is no suffix; write it in lower case and without the "
                    "first dot, such as 'caption'"
                )
            if suffixes.count(suffix) > 1:
                raise ValueError(
                    f"source: suffix {suffix!r} is named twice among captions, videos, images "
                    f"({', '.join(IMAGE_SUFFIXES)}) and {METADATA_SUFFIX}; leave one out"
                )
        if any("." in suffix for suffix in self.video_suffixes):
            raise ValueError(
                f"source.video_suffixes {list(self.video_suffixes)}: a video's suffix is what "
                "follows the last dot; leave out what is before it"
            )
        return self

    @property
    def media_suffixes(self) -> tuple[str, ...]:
        """Of videos, then of images."""
        return (*self.video_suffixes, *IMAGE_SUFFIXES)

    @property
    def text_suffixes(self) -> tuple[str, ...]:
        """Of captions, then of metadata."""
        return (*self.caption_suffixes, METADATA_SUFFIX)

    def caption_in(self, metadata: dict[str, Any]) -> str:
        """The caption that a sample's json holds; empty where it holds none."""
        for name in self.caption_fields:
            if text := str(_field(metadata, name) or "").strip():
                return text
        return ""


def _field(values: Any, name: str) -> Any:
    """The value of a field, by its whole name or by the objects it is in; None where it is not."""
    if not isinstance(values, dict):
        return None
    if name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    return _field(values.get(first), rest) if dot else None
