"""Settings of the buckets: how long, how large and how fast clips may be, and what a codec takes.

Lengths, resolutions and aspects are independent: a video has one length (the longest that fits
it), every resolution, and in each of them one size (that of the nearest aspect). What a size must
be, given the codec, is checked where the codec is known: `BucketConfig.check`. Knows nothing of
decoders or Ray.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from data_prep.strict import Strict
from flow.aspects import SizeError, area_of, ratio_of, size_of
from flow.codec_factors import CodecFactors

MAX_FRAMES = 1025
"""Most frames of a clip."""
MAX_SIDE = 4096
"""Most rows or columns of a clip, in pixels."""
MAX_RATIO = 8
"""Most that a bucket may be longer in one direction than in the other."""

Size = tuple[int, int]
"""Rows and columns, in pixels."""


class BucketConfig(Strict):
    """Lengths, sizes and rate of the clips that are cut from the videos.

    With `frame_counts` a video goes into the longest that fits it. With `aspects` or `sizes` it
    goes into the one whose aspect is nearest to its own. With `resolutions` each of its windows is
    cut in every one of them: number w in the order of time and number r in the order of the
    settings make window w · len(resolutions) + r of the record's id.

    >>> from flow.codec_factors import WAN_FACTORS
    >>> bucket = BucketConfig(aspects=("1:1", "16:9"))
    >>> bucket.all_sizes(WAN_FACTORS.space)
    [(64, 64), (48, 80)]
    >>> several = BucketConfig(aspects=("1:1", "16:9"), resolutions=("384p", "480p"))
    >>> several.sizes_by_resolution(WAN_FACTORS.space)
    [[(512, 512), (384, 688)], [(640, 640), (480, 848)]]
    >>> BucketConfig(num_frames=16).check(WAN_FACTORS)
    Traceback (most recent call last):
    ...
    flow.aspects.SizeError: bucket.num_frames is 16; the codec takes 4k+1 frames: use 13 or 17
    """

    num_frames: int = Field(
        default=17,
        ge=1,
        le=MAX_FRAMES,
        description="Frames per clip: a multiple of the codec's factor in time, plus 1.",
    )
    frame_counts: tuple[int, ...] = Field(
        default=(),
        max_length=16,
        description="Several lengths of clips, in frames, instead of num_frames: a video goes into "
        "the longest that fits it, such as [81, 49, 33, 17]; none: num_frames alone.",
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
    sizes: tuple[Size, ...] = Field(
        default=(),
        max_length=64,
        description="Buckets of exactly these (rows, columns) in pixels, instead of aspects.",
    )
    resolutions: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="Areas, instead of height × width: every window is cut in each of them, from "
        "one decoding. 480p is the area of a 16:9 picture of 480 rows, 640². Without aspects, the "
        "aspect is that of height × width.",
    )
    max_enlargement: float | None = Field(
        default=None,
        ge=1,
        description="Most that a picture is enlarged in each direction. A size that needs more is "
        "left out of a video or image (too_small); None: any.",
    )

    @model_validator(mode="after")
    def _buckets_are_named_once(self) -> BucketConfig:
        for name in ("aspects", "resolutions"):
            if self.sizes and getattr(self, name):
                raise ValueError(f"bucket.{name} and bucket.sizes are both given; give one of them")
        for side in (side for size in self.sizes for side in size):
            if not 1 <= side <= MAX_SIDE:
                raise ValueError(f"bucket.sizes is {side} pixels; allowed are 1 to {MAX_SIDE}")
        for aspect in self.aspects:
            if not 1 / MAX_RATIO <= ratio_of(aspect) <= MAX_RATIO:
                raise ValueError(
                    f"aspect {aspect!r} is beyond {MAX_RATIO}:1; "
                    f"use one between 1:{MAX_RATIO} and {MAX_RATIO}:1"
                )
        most = MAX_SIDE * 9 // 16
        for resolution in self.resolutions:
            if area_of(resolution) > area_of(f"{most}p"):
                raise ValueError(f"resolution {resolution!r} is beyond {most}p, the largest")
        return self

    @model_validator(mode="after")
    def _lengths_are_several(self) -> BucketConfig:
        for count in self.frame_counts:
            if not 2 <= count <= MAX_FRAMES:
                raise ValueError(
                    f"bucket.frame_counts holds {count}; a clip has 2 to {MAX_FRAMES} frames"
                )
        if len(set(self.frame_counts)) < len(self.frame_counts):
            raise ValueError(
                f"bucket.frame_counts {list(self.frame_counts)} names a length twice; leave one out"
            )
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames of a clip in every bucket, the longest first."""
        return tuple(sorted(self.frame_counts or (self.num_frames,), reverse=True))

    def sizes_by_resolution(self, space: int) -> list[list[Size]]:
        """The sizes of every resolution in the order of the settings; one list where none is named.

        Args:
            space: the codec's factor in space, to whose multiples the sides are rounded where
                aspects or resolutions give them.
        """
        if self.sizes:
            return [list(self.sizes)]
        if not self.aspects and not self.resolutions:
            return [[(self.height, self.width)]]
        ratios = [ratio_of(aspect) for aspect in self.aspects] or [self.width / self.height]
        areas = [area_of(name) for name in self.resolutions] or [self.height * self.width]
        return [[size_of(ratio, area, space) for ratio in ratios] for area in areas]

    def all_sizes(self, space: int) -> list[Size]:
        """The sizes of every bucket: those of `sizes_by_resolution`, one after the other."""
        return [size for sizes in self.sizes_by_resolution(space) for size in sizes]

    def check(self, factors: CodecFactors) -> None:
        """Hold frames and sizes against what a codec of these factors takes.

        Raises:
            SizeError: the codec does not take them; the message names the nearest that it takes.
        """
        name = "frame_counts" if self.frame_counts else "num_frames"
        for count in self.lengths:
            if not factors.takes(count):
                below, above = factors.near_frames(count)
                raise SizeError(
                    f"bucket.{name} is {count}; the codec takes {factors.time}k+1 "
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
                f"bucket.aspects {list(self.aspects)}, resolutions {list(self.resolutions)} and "
                f"sizes {list(self.sizes)} give the same size twice: {sizes}; leave one out, or "
                "enlarge height × width"
            )
