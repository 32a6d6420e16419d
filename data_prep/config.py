"""Settings of data preparation, each with its unit. Knows nothing of how they are carried out.

What decides a sample's fate goes into `PrepareConfig.latent_digest` and `caption_digest`; deadlines
and concurrency are outside both, for they may change when, never what.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PREPARE_VERSION = 1
"""Raised when the code changes what a sample becomes."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BucketConfig(_Strict):
    """Size and rate of the clips that are cut from the videos."""

    num_frames: int = Field(default=17, ge=1, le=1025, description="Frames per clip; 4k+1.")
    height: int = Field(default=64, ge=16, le=4096, description="Rows in pixels; a multiple of 16.")
    width: int = Field(
        default=64, ge=16, le=4096, description="Columns in pixels; a multiple of 16."
    )
    fps: float = Field(
        default=8.0, gt=0, le=120, description="Frame rate of a clip, frames per second."
    )

    @model_validator(mode="after")
    def _fits_the_codec(self) -> BucketConfig:
        if (self.num_frames - 1) % 4:
            near = (self.num_frames - 1) // 4 * 4 + 1
            raise ValueError(
                f"bucket.num_frames is {self.num_frames}; the codec takes 4k+1 frames: "
                f"use {near} or {near + 4}"
            )
        for name in ("height", "width"):
            value = getattr(self, name)
            if value % 16:
                raise ValueError(
                    f"bucket.{name} is {value} pixels; the codec needs a multiple of 16: "
                    f"use {value // 16 * 16 or 16} or {value // 16 * 16 + 16}"
                )
        return self


class FilterConfig(_Strict):
    """What is kept. A filter set to None or false is off."""

    matching_score_above: float | None = Field(
        default=0.43, description="Keep clips whose caption matching score (0..1) is above this."
    )
    desirable: bool = Field(default=True, description="Keep only clips marked desirable.")
    one_shot: bool = Field(default=True, description="Keep only clips of a single shot.")
    min_area_pixels: int = Field(
        default=0, ge=0, description="Least source height × width, in pixels."
    )
    min_duration_s: float = Field(
        default=0.0, ge=0, description="Least length of the source, in seconds."
    )
    missing_metadata: Literal["keep", "drop"] = Field(
        default="keep",
        description="What becomes of samples without the metadata that a filter reads.",
    )


class CapConfig(_Strict):
    """Limits on one sample. Over one of them a sample gets a status, never a crash."""

    max_media_bytes: int = Field(
        default=512 * 2**20, gt=0, description="Bytes of one video or image."
    )
    max_pixels: int = Field(
        default=33_177_600, gt=0, description="Pixels of one source frame (8K)."
    )
    decoder_memory_bytes: int = Field(
        default=8 * 2**30, ge=2**30, description="Address space of the decoding process, in bytes."
    )


class ConcurrencyConfig(_Strict):
    """How much runs at once; None lets the preflight choose from the cluster's CPUs."""

    shards_in_flight: int = Field(
        default=2, ge=1, description="Input shards read at the same time."
    )
    decoders: int | None = Field(default=None, ge=1, description="Decoding actors.")
    captioners: int | None = Field(default=None, ge=1, description="Captioning actors.")
    encoders: int | None = Field(default=None, ge=1, description="Codec actors.")
    encoder_gpus: float = Field(
        default=0.0, ge=0, description="GPUs per codec actor; 0 encodes on CPU."
    )


class PrepareConfig(_Strict):
    """One run of data preparation.

    Example:
        >>> PrepareConfig(bucket=BucketConfig(num_frames=17)).bucket.fps
        8.0
    """

    bucket: BucketConfig = Field(default_factory=BucketConfig, description="Size of the clips.")
    seed: int = Field(default=0, ge=0, description="Seed of the window choice.")
    images: bool = Field(default=True, description="Take image–text samples as clips of one frame.")
    filters: FilterConfig = Field(default_factory=FilterConfig, description="What is kept.")
    captioner: Literal["measured"] = Field(
        default="measured",
        description="Who writes the synthetic captions; `measured` needs no weights.",
    )
    keep_logvar: bool = Field(
        default=True, description="Store the posterior log-variance beside the mean."
    )
    encoder_threads: int = Field(
        default=1, ge=1, le=64, description="CPU threads of the codec (fixed)."
    )
    caps: CapConfig = Field(default_factory=CapConfig, description="Limits on one sample.")
    deadline_s: float = Field(
        default=30.0,
        gt=0,
        description="Seconds to decode one clip; tried again with three times as many.",
    )
    verify: bool = Field(
        default=False, description="Tell changed shards by content, not by size and time."
    )
    concurrency: ConcurrencyConfig = Field(
        default_factory=ConcurrencyConfig, description="How much runs at once."
    )

    def latent_settings(self) -> dict[str, Any]:
        """The settings that decide a sample's status and latents, as plain values."""
        values = self.model_dump(mode="json")
        for name in ("captioner", "deadline_s", "verify", "concurrency"):
            del values[name]
        return {"prepare_version": PREPARE_VERSION, **values}

    def latent_digest(self, codec: str) -> str:
        """Digest of what decides latents: the settings above and the codec's digest."""
        return digest_of({**self.latent_settings(), "codec": codec})

    def caption_digest(self) -> str:
        """Digest of what decides the synthetic captions, given the clip."""
        return digest_of({"captioner": self.captioner, "caption_version": 1})


def digest_of(values: dict[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of values as canonical JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
