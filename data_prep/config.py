"""Settings of data preparation, each with its unit. Knows nothing of how they are carried out.

What decides a sample's fate goes into `PrepareConfig.latent_digest` and `caption_digest`; deadlines
and concurrency are outside both, for they may change when, never what.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PREPARE_VERSION = 3
"""Raised when the code changes what a sample becomes."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Pool = int | tuple[int, int] | None
"""Actors of a stage: so many, between least and most, or as the preflight finds."""


class BucketConfig(_Strict):
    """Sizes and rate of the clips that are cut from the videos.

    With `aspects` or `sizes` there are several buckets, and each video goes into the one whose aspect is
    nearest to its own.

    Example:
        >>> [f"{h}x{w}" for h, w in BucketConfig(aspects=("1:1", "16:9")).all_sizes()]
        ['64x64', '48x80']
    """

    num_frames: int = Field(default=17, ge=1, le=1025, description="Frames per clip; 4k+1.")
    height: int = Field(default=64, ge=16, le=4096, description="Rows in pixels; a multiple of 16.")
    width: int = Field(
        default=64, ge=16, le=4096, description="Columns in pixels; a multiple of 16."
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
    def _fits_the_codec(self) -> BucketConfig:
        if (self.num_frames - 1) % 4:
            near = (self.num_frames - 1) // 4 * 4 + 1
            raise ValueError(
                f"bucket.num_frames is {self.num_frames}; the codec takes 4k+1 frames: "
                f"use {near} or {near + 4}"
            )
        named = [("height", self.height), ("width", self.width)]
        for name, value in named + [("sizes", side) for size in self.sizes for side in size]:
            if value % 16 or not 16 <= value <= 4096:
                raise ValueError(
                    f"bucket.{name} is {value} pixels; the codec needs a multiple of 16: "
                    f"use {value // 16 * 16 or 16} or {value // 16 * 16 + 16}"
                )
        if self.aspects and self.sizes:
            raise ValueError("bucket.aspects and bucket.sizes are both given; give one of them")
        for aspect in self.aspects:
            _ratio(aspect)
        if len(set(self.all_sizes())) < len(self.aspects or self.sizes):
            raise ValueError(
                f"bucket.aspects {list(self.aspects)} and sizes {list(self.sizes)} give the same size "
                f"twice: {self.all_sizes()}; leave one out, or enlarge height × width"
            )
        return self

    def all_sizes(self) -> list[tuple[int, int]]:
        """(rows, columns) of every bucket, in pixels."""
        if self.sizes:
            return list(self.sizes)
        area = self.height * self.width
        return [_sized(_ratio(aspect), area) for aspect in self.aspects] or [
            (self.height, self.width)
        ]


def _ratio(aspect: str) -> float:
    """Width over height of a text such as 16:9."""
    width, colon, height = aspect.partition(":")
    if not (colon and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"aspect {aspect!r} is not WIDTH:HEIGHT in whole numbers, such as 16:9")
    if not 1 / 8 <= int(width) / int(height) <= 8:
        raise ValueError(f"aspect {aspect!r} is beyond 8:1; use one between 1:8 and 8:1")
    return int(width) / int(height)


def _sized(ratio: float, area: int) -> tuple[int, int]:
    """The multiples of 16 nearest to a rectangle of this ratio and area."""
    height, width = (area / ratio) ** 0.5, (area * ratio) ** 0.5
    return max(16, round(height / 16) * 16), max(16, round(width / 16) * 16)


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
    crop_bars: bool = Field(
        default=False,
        description="Measure black bars (letterbox, pillarbox) and cut them off before the resize.",
    )
    max_bar_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="With crop_bars: drop sources whose bars take more than this share of the area.",
    )
    static_below: float | None = Field(
        default=None,
        gt=0,
        le=255,
        description="Drop clips whose mean absolute change from frame to frame is below this many of "
        "256 grey levels; 0.5 drops stills with compression noise.",
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


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        hidden = parts.username or parts.password or parts.query or parts.fragment
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not hidden
    except ValueError:
        return False


class CaptionConfig(_Strict):
    """Who writes the synthetic captions, and how. A plain name is a back end with its defaults.

    What decides the words is in `caption_digest`; where an endpoint is, how often it is asked and
    how long it may take are not: they may change between runs of one output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    backend: Literal["measured", "vlm", "vllm", "http"] = Field(
        default="measured",
        description="measured: read from the pixels, no weights. vlm: a transformers model in the "
        "captioning actors. vllm: the same on vLLM, through ray.data.llm (GPUs; extra "
        "flowreel[vllm]). http: any OpenAI-compatible chat endpoint.",
    )
    model: str | None = Field(
        default=None, description="Folder or hub id (vlm, vllm), or the endpoint's name for it."
    )
    revision: str | None = Field(
        default=None, description="Hub revision of the model: a commit keeps captions repeatable."
    )
    prompt: str = Field(
        default="Describe this video in one or two plain sentences: who or what is seen, what "
        "happens, where, and how the camera moves. The images are its frames in order.",
        min_length=1,
        description="What the model is asked about a clip.",
    )
    image_prompt: str = Field(
        default="Describe this picture in one or two plain sentences: who or what is seen, and "
        "where.",
        min_length=1,
        description="What the model is asked about a clip of one frame.",
    )
    frames: int = Field(
        default=4,
        ge=1,
        le=64,
        description="Frames shown, evenly spaced, first and last among them.",
    )
    max_tokens: int = Field(default=96, ge=1, le=4096, description="Longest caption, in tokens.")
    batch_size: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Clips in one call (vlm: every call is padded to it; vllm: rows in a batch).",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Precision of the model's weights (vlm, vllm)."
    )
    threads: int = Field(
        default=1, ge=1, le=64, description="CPU threads of a captioning actor (vlm; fixed)."
    )
    endpoint: str | None = Field(
        default=None,
        description="Base URL of the endpoint, such as http://host:8000/v1 (http).",
    )
    api_key_env: str | None = Field(
        default=None,
        description="Environment variable of the Ray workers that holds the endpoint's bearer key; "
        "None sends no key.",
    )
    requests_in_flight: int = Field(
        default=8, ge=1, le=1024, description="Requests of one captioning actor at a time (http)."
    )
    retries: int = Field(
        default=5, ge=0, le=100, description="Tries after the first before a caption is given up."
    )
    backoff_s: float = Field(
        default=1.0, gt=0, description="Seconds before the first retry; doubles, at most 60."
    )
    request_timeout_s: float = Field(default=60.0, gt=0, description="Seconds for one request.")
    deadline_s: float = Field(
        default=300.0, gt=0, description="Seconds for one caption, with all its retries."
    )
    max_response_bytes: int = Field(
        default=1 << 20,
        ge=1024,
        description="Largest answer of the endpoint that is read, in bytes.",
    )
    give_up_after: int = Field(
        default=32,
        ge=1,
        description="Captions that may fail in a row in one actor before the run stops.",
    )
    batch_invariant: bool = Field(
        default=True,
        description="vLLM's batch-invariant kernels, so that a caption does not depend on its "
        "neighbours (H100 or newer); false trades that for speed and older GPUs.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Further engine arguments of vLLM, such as tensor_parallel_size.",
    )

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> CaptionConfig:
        if self.backend != "measured" and not self.model:
            what = "the endpoint's name of it" if self.backend == "http" else "a folder or hub id"
            raise ValueError(f"captioner.backend {self.backend!r} needs captioner.model: {what}")
        if self.backend == "http" and not self.endpoint:
            raise ValueError(
                "captioner.backend 'http' needs captioner.endpoint, such as http://host:8000/v1"
            )
        # What follows may hold a secret, so it is not repeated: these are rules of the whole
        # section, and its values stay out of error messages.
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                "captioner.api_key_env is no name of an environment variable; put the key into one "
                "and give its name here"
            )
        if self.endpoint and not _is_plain_url(self.endpoint):
            raise ValueError(
                "captioner.endpoint must be a plain base URL such as http://host:8000/v1: http or "
                "https, no user, password or query; a key goes into the environment variable that "
                "captioner.api_key_env names"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """What decides a caption, given the clip; of a model folder, its content."""
        if self.backend == "measured":
            return {}
        names = ["model", "revision", "prompt", "image_prompt", "frames", "max_tokens"]
        if self.backend in ("vlm", "vllm"):
            names += ["dtype"]
        # The shape of a call decides which kernels run, hence the last bits.
        names += {"vlm": ["batch_size", "threads"], "vllm": ["batch_invariant", "engine"]}.get(
            self.backend, []
        )
        values = {name: getattr(self, name) for name in names}
        if self.backend != "http" and self.model and Path(self.model).is_dir():
            values["model"] = folder_identity(Path(self.model))
        return values


class ConcurrencyConfig(_Strict):
    """How much runs at once; None lets the preflight choose from the cluster's CPUs."""

    shards_in_flight: int = Field(
        default=2, ge=1, description="Input shards read at the same time."
    )
    block_bytes: int = Field(
        default=16 * 2**20,
        ge=1,
        description="What passes from stage to stage at once. A block costs some tens of milliseconds of scheduling; "
        "what it holds is made again when a run is killed. 1 passes every sample by itself.",
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


class PrepareConfig(_Strict):
    """One run of data preparation.

    Example:
        >>> PrepareConfig(bucket=BucketConfig(num_frames=17)).bucket.fps
        8.0
    """

    bucket: BucketConfig = Field(default_factory=BucketConfig, description="Size of the clips.")
    seed: int = Field(default=0, ge=0, description="Seed of the window choice.")
    windows_per_clip: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Most windows cut from one video, without overlap; short videos give fewer.",
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
        description="Mask clips whose perceptual hash is within so many of 256 bits of an earlier clip's; None masks nothing.",
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
        """Digest of what decides latents: the settings above and the codec's digest."""
        return digest_of({**self.latent_settings(), "codec": codec})

    def outcome_digest(self, codec: str) -> str:
        """The same without what the metadata filters alone decide: given that a sample passes those."""
        values = self.latent_settings()
        for name in ("matching_score_above", "desirable", "one_shot", "missing_metadata"):
            del values["filters"][name]
        return digest_of({**values, "codec": codec})

    def encode_digest(self, codec: str) -> str:
        """Digest of what decides latents, given the frames."""
        settings = {"prepare_version": PREPARE_VERSION, "codec": codec}
        names = ("keep_logvar", "encoder_threads")
        return digest_of({**settings, **{name: getattr(self, name) for name in names}})

    def caption_digest(self) -> str:
        """Digest of what decides the synthetic captions, given the clip (reads a model's folder)."""
        settings = self.captioner.settings()
        if settings:
            settings["seed"] = self.seed
        return digest_of({"captioner": self.captioner.backend, "caption_version": 1, **settings})


_SAMPLED_BYTES = 1 << 20


def folder_identity(folder: Path) -> str:
    """What tells one model folder from another without reading all its weights.

    A hash of every file's name and size, of small files whole and of large ones the first and last
    MiB: training changes weights everywhere. Hidden files (download caches) do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        size_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size_bytes}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            if size_bytes > _SAMPLED_BYTES:
                file.seek(max(_SAMPLED_BYTES, size_bytes - _SAMPLED_BYTES))
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def digest_of(values: dict[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of values as canonical JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
