"""Settings of data preparation, each with its unit. Knows nothing of how they are carried out.

What decides a sample's fate goes into `PrepareConfig.latent_digest` and `caption_digest`. Deadlines
and concurrency are outside both, because they may change when a sample is done, never what becomes
of it. The buckets' settings are in `data_prep.clips.buckets`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.captions.config import CaptionConfig

# Whoever sets up a run takes all its settings from here.
from data_prep.clips.buckets import BucketConfig as BucketConfig
from data_prep.sources.config import SourceConfig
from data_prep.strict import Strict
from flowreel.values import digest_of

PREPARE_VERSION = 5
"""Raised when the code changes what a sample becomes."""

METADATA_FILTERS = ("matching_score_above", "desirable", "one_shot", "missing_metadata")
"""The filters that judge metadata alone: `PrepareConfig.outcome_digest` leaves them out."""
METADATA_REASONS = ("low_matching_score", "not_desirable", "several_shots", "missing_metadata")
"""The reasons that those filters give: such a verdict is never taken over from an earlier run."""

Pool = int | tuple[int, int] | None
"""Actors of a stage: so many, between least and most, or as many as the preflight chooses."""


class FilterConfig(Strict):
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
    min_source_fps: float = Field(
        default=5.0, ge=0, description="Least frame rate of the source, frames per second."
    )
    max_gap_s: float | None = Field(
        default=1.0,
        gt=0,
        description="Longest time without a new frame inside a window, in seconds; None: any.",
    )
    progressive: bool = Field(
        default=True, description="Drop interlaced sources, which motion tears into combs."
    )
    missing_metadata: Literal["keep", "drop"] = Field(
        default="keep",
        description="What becomes of samples without the metadata that a filter reads.",
    )
    crop_bars: bool = Field(
        default=False,
        description="Measure black bars (letterbox, pillarbox) and cut them off before the resize.",
    )
    max_bar_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="With crop_bars: drop sources whose bars take more than this share of the "
        "area.",
    )
    static_below: float | None = Field(
        default=None,
        gt=0,
        le=255,
        description="Drop clips whose mean absolute change from frame to frame is below this many "
        "of 256 grey levels; 0.5 drops stills with compression noise.",
    )
    max_black_frames: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Drop clips with more than this share of black frames.",
    )
    max_white_frames: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Drop clips with more than this share of white frames.",
    )


class CapConfig(Strict):
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


class ConcurrencyConfig(Strict):
    """How much runs at once; None lets the preflight choose from the cluster's CPUs."""

    shards_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="Input shards read at the same time; None: 2, and one more for every 8 CPUs "
        "beyond 16.",
    )
    grow_to_cpus: int | None = Field(
        default=None,
        ge=1,
        description="CPUs that an autoscaling cluster may come to have: pools may grow to fill "
        "them. None: what the autoscaler says, or those that are there.",
    )
    block_bytes: int = Field(
        default=16 * 2**20,
        ge=1,
        description="Bytes that pass from stage to stage at once. A block costs some tens of "
        "milliseconds of scheduling; what it holds is made again when a run is killed. 1 passes "
        "every sample by itself.",
    )
    decoders: Pool = Field(default=None, description="Decoding actors: a number, or [least, most].")
    captioners: Pool = Field(
        default=None, description="Captioning actors: a number, or [least, most]."
    )
    captioner_gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs per captioning actor (vlm, vllm); 0 captions on CPU.",
    )
    encoders: Pool = Field(default=None, description="Codec actors: a number, or [least, most].")
    encoder_gpus: float = Field(
        default=0.0, ge=0, description="GPUs per codec actor; 0 encodes on CPU."
    )
    sinks: int | None = Field(
        default=None,
        ge=1,
        description="Actors that write the output, each for shards of its own; None: one for every "
        "16 CPUs.",
    )

    @model_validator(mode="after")
    def _pools_are_ranges(self) -> ConcurrencyConfig:
        for name in ("decoders", "captioners", "encoders"):
            least, most = bounds(getattr(self, name)) or (1, 1)
            if not 1 <= least <= most:
                raise ValueError(
                    f"concurrency.{name} is {getattr(self, name)}; give a number from 1, or "
                    "[least, most] with 1 ≤ least ≤ most"
                )
        return self


def bounds(pool: Pool) -> tuple[int, int] | None:
    """(least, most) actors of a pool; None where the preflight chooses.

    >>> bounds(3), bounds((1, 4)), bounds(None)
    ((3, 3), (1, 4), None)
    """
    return (pool, pool) if isinstance(pool, int) else pool


class PrepareConfig(Strict):
    """One run of data preparation.

    >>> PrepareConfig(bucket=BucketConfig(num_frames=17)).bucket.fps
    8.0
    """

    source: SourceConfig = Field(
        default_factory=SourceConfig, description="What belongs to a sample."
    )
    bucket: BucketConfig = Field(default_factory=BucketConfig, description="Size of the clips.")
    seed: int = Field(
        default=0, ge=0, description="Seed by which the windows of a video are chosen."
    )
    windows_per_clip: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Most windows (of the bucket's frames) cut from one video, without overlap; "
        "short videos give fewer.",
    )
    images: bool = Field(default=True, description="Take image–text samples as clips of one frame.")
    filters: FilterConfig = Field(default_factory=FilterConfig, description="What is kept.")
    captioner: CaptionConfig = Field(
        default_factory=CaptionConfig,
        description="Who writes the synthetic captions: a back end's name, or its settings.",
    )
    keep_logvar: bool = Field(
        default=True, description="Store the posterior log-variance beside the mean."
    )
    encoder_threads: int = Field(
        default=1, ge=1, le=64, description="CPU threads of the codec (fixed)."
    )
    duplicate_bits: int | None = Field(
        default=None,
        ge=0,
        le=14,
        description="Mask clips whose perceptual hash is within so many of 256 bits of an earlier "
        "clip's; None masks nothing.",
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

    @field_validator("captioner", mode="before")
    @classmethod
    def _a_name_is_a_backend(cls, value: Any) -> Any:
        return {"backend": value} if isinstance(value, str) else value

    def latent_settings(self) -> dict[str, Any]:
        """The settings that decide a sample's status and latents, as plain values."""
        values = self.model_dump(mode="json")
        for name in ("captioner", "deadline_s", "verify", "concurrency", "duplicate_bits"):
            del values[name]
        return {"prepare_version": PREPARE_VERSION, **values}

    def latent_digest(self, codec: str) -> str:
        """Digest of what decides a sample's status and latents; `codec` is the codec's digest."""
        return digest_of({**self.latent_settings(), "codec": codec})

    def outcome_digest(self, codec: str) -> str:
        """Digest of what decides them, given a sample that passes the metadata filters."""
        values = self.latent_settings()
        del values["source"]
        for name in METADATA_FILTERS:
            del values["filters"][name]
        return digest_of({**values, "codec": codec})

    def encode_digest(self, codec: str) -> str:
        """Digest of what decides latents, given the frames."""
        settings = {"prepare_version": PREPARE_VERSION, "codec": codec}
        names = ("keep_logvar", "encoder_threads")
        return digest_of({**settings, **{name: getattr(self, name) for name in names}})

    def caption_digest(self) -> str:
        """Digest of what decides the synthetic captions, given the clip; reads a model's folder."""
        settings = self.captioner.settings()
        if self.captioner.needs_model:
            settings["seed"] = self.seed
        if self.captioner.backend in ("auto", "measured"):
            settings["fps"] = self.bucket.fps
        return digest_of({"captioner": self.captioner.backend, "caption_version": 1, **settings})
