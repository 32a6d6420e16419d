"""Settings of data preparation, each with its unit. Knows nothing of how they are carried out.

What decides a sample's fate goes into `PrepareConfig.latent_digest` and `caption_digest`. Deadlines
and concurrency are outside both, because they may change when a sample is done, never what becomes
of it. What a clip's size must be, given the codec, is checked where the codec is known:
`BucketConfig.check`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.captions.config import CaptionConfig
from data_prep.strict import Strict
from flow.aspects import SizeError, ratio_of, size_of
from flow.codec_factors import CodecFactors
from flowreel.values import digest_of

PREPARE_VERSION = 4
"""Raised when the code changes what a sample becomes."""

MAX_SIDE = 4096
"""Most rows or columns of a clip, in pixels."""
MAX_RATIO = 8
"""Most that a bucket may be longer in one direction than in the other."""

METADATA_FILTERS = ("matching_score_above", "desirable", "one_shot", "missing_metadata")
"""The filters that judge metadata alone: `PrepareConfig.outcome_digest` leaves them out."""
METADATA_REASONS = ("low_matching_score", "not_desirable", "several_shots", "missing_metadata")
"""The reasons that those filters give: such a verdict is never taken over from an earlier run."""

Pool = int | tuple[int, int] | None
"""Actors of a stage: so many, between least and most, or as many as the preflight chooses."""


class BucketConfig(Strict):
    """Sizes and rate of the clips that are cut from the videos.

    With `aspects` or `sizes` there are several buckets, and each video goes into the one whose
    aspect is nearest to its own.

    >>> from flow.codec_factors import WAN_FACTORS
    >>> bucket = BucketConfig(aspects=("1:1", "16:9"))
    >>> bucket.all_sizes(WAN_FACTORS.space)
    [(64, 64), (48, 80)]
    >>> BucketConfig(num_frames=16).check(WAN_FACTORS)
    Traceback (most recent call last):
    ...
    flow.aspects.SizeError: bucket.num_frames is 16; the codec takes 4k+1 frames: use 13 or 17
    """

    num_frames: int = Field(
        default=17,
        ge=1,
        le=1025,
        description="Frames per clip: a multiple of the codec's factor in time, plus 1.",
    )
    height: int = Field(
        default=64,
        ge=1,
        le=MAX_SIDE,
        description="Rows in pixels; a multiple of the codec's factor in space.",
    )
    width: int = Field(
        default=64,
        ge=1,
        le=MAX_SIDE,
        description="Columns in pixels; a multiple of the codec's factor in space.",
    )
    fps: float = Field(
        default=8.0, gt=0, le=120, description="Frame rate of a clip, frames per second."
    )
    aspects: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="Buckets of these aspects (width:height, such as 16:9), each of about the area "
        "height × width; none: one bucket of height × width.",
    )
    sizes: tuple[tuple[int, int], ...] = Field(
        default=(),
        max_length=64,
        description="Buckets of exactly these (rows, columns) in pixels, instead of aspects.",
    )

    @model_validator(mode="after")
    def _buckets_are_named_once(self) -> BucketConfig:
        if self.aspects and self.sizes:
            raise ValueError("bucket.aspects and bucket.sizes are both given; give one of them")
        for side in (side for size in self.sizes for side in size):
            if not 1 <= side <= MAX_SIDE:
                raise ValueError(f"bucket.sizes is {side} pixels; allowed are 1 to {MAX_SIDE}")
        for aspect in self.aspects:
            if not 1 / MAX_RATIO <= ratio_of(aspect) <= MAX_RATIO:
                raise ValueError(
                    f"aspect {aspect!r} is beyond {MAX_RATIO}:1; "
                    f"use one between 1:{MAX_RATIO} and {MAX_RATIO}:1"
                )
        return self

    def all_sizes(self, space: int) -> list[tuple[int, int]]:
        """(rows, columns) in pixels of every bucket, in the order of the settings.

        Args:
            space: the codec's factor in space, to whose multiples the sides of aspects are rounded.
        """
        if self.sizes:
            return list(self.sizes)
        if not self.aspects:
            return [(self.height, self.width)]
        area = self.height * self.width
        return [size_of(ratio_of(aspect), area, space) for aspect in self.aspects]

    def check(self, factors: CodecFactors) -> None:
        """Hold frames and sizes against what a codec of these factors takes.

        Raises:
            SizeError: the codec does not take them; the message names the nearest that it takes.
        """
        if not factors.takes(self.num_frames):
            below, above = factors.near_frames(self.num_frames)
            raise SizeError(
                f"bucket.num_frames is {self.num_frames}; the codec takes {factors.time}k+1 "
                f"frames: use {below} or {above}"
            )
        sides = [("height", self.height), ("width", self.width)]
        for name, side in sides + [("sizes", side) for size in self.sizes for side in size]:
            if side % factors.space:
                below = side // factors.space * factors.space
                near = " or ".join(str(n) for n in (below, below + factors.space) if n)
                raise SizeError(
                    f"bucket.{name} is {side} pixels; the codec needs a multiple of "
                    f"{factors.space}: use {near}"
                )
        sizes = self.all_sizes(factors.space)
        if len(set(sizes)) < len(sizes):
            raise SizeError(
                f"bucket.aspects {list(self.aspects)} and sizes {list(self.sizes)} give the same "
                f"size twice: {sizes}; leave one out, or enlarge height × width"
            )


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

    shards_in_flight: int = Field(
        default=2, ge=1, description="Input shards read at the same time."
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

    bucket: BucketConfig = Field(default_factory=BucketConfig, description="Size of the clips.")
    seed: int = Field(
        default=0, ge=0, description="Seed by which the windows of a video are chosen."
    )
    windows_per_clip: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Most windows (of bucket.num_frames frames) cut from one video, without "
        "overlap; short videos give fewer.",
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
        """Digest of what decides them, given that the sample passes the metadata filters."""
        values = self.latent_settings()
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
        return digest_of({"captioner": self.captioner.backend, "caption_version": 1, **settings})
