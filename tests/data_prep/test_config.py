"""Settings: what is refused and with which words, what the digests follow, sizes of buckets."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from data_prep.config import BucketConfig, PrepareConfig
from flow.aspects import ASPECTS, SizeError
from flow.codec_factors import SD_FACTORS, WAN_FACTORS, CodecFactors


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sead": 1}, "Extra inputs"),
        ({"filters": {"min_area": 3}}, "Extra inputs"),
        ({"captioner": "magic"}, "measured"),
        ({"bucket": {"aspects": ["16/9"]}}, "WIDTH:HEIGHT"),
        ({"bucket": {"aspects": ["99:1"]}}, "beyond 8:1; use one between 1:8 and 8:1"),
        ({"bucket": {"aspects": ["1:1"], "sizes": [[64, 64]]}}, "give one of them"),
        ({"bucket": {"sizes": [[64, 8192]]}}, "8192 pixels; allowed are 1 to 4096"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_rule(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        PrepareConfig.model_validate(values)


@pytest.mark.parametrize(
    ("bucket", "factors", "words"),
    [
        ({"num_frames": 16}, WAN_FACTORS, "is 16; the codec takes 4k.1 frames: use 13 or 17"),
        ({"num_frames": 17}, CodecFactors(16, 6), "takes 6k.1 frames: use 13 or 19"),
        ({"num_frames": 16}, SD_FACTORS, ""),
        ({"height": 50}, WAN_FACTORS, "bucket.height is 50 pixels; .* of 16: use 48 or 64"),
        ({"width": 8}, WAN_FACTORS, "bucket.width is 8 pixels; .* of 16: use 16"),
        ({"width": 72}, SD_FACTORS, ""),
        ({"sizes": [[64, 50]]}, WAN_FACTORS, "bucket.sizes is 50 pixels; .*: use 48 or 64"),
        ({"aspects": ["1:1", "2:2"]}, WAN_FACTORS, "same size twice"),
        # In multiples of 32 two aspects of a small area are one.
        ({"aspects": ["1:1", "5:4"]}, CodecFactors(32, 4), "same size twice"),
    ],
)
def test_clips_that_a_codec_does_not_take_are_refused_with_what_is_near(
    bucket: dict[str, Any], factors: CodecFactors, words: str
) -> None:
    config = BucketConfig.model_validate(bucket)
    if not words:
        config.check(factors)
        return
    with pytest.raises(SizeError, match=words) as caught:
        config.check(factors)
    assert "\n" not in str(caught.value)


def test_the_usual_aspects_of_480p_are_multiples_of_16_of_nearly_one_area() -> None:
    bucket = BucketConfig(num_frames=81, height=480, width=832, aspects=ASPECTS)
    sizes = bucket.all_sizes(WAN_FACTORS.space)
    assert sizes[3:5] == [(480, 848), (848, 480)]
    for aspect, (height, width) in zip(ASPECTS, sizes, strict=True):
        wide, high = map(int, aspect.split(":"))
        assert width / height == pytest.approx(wide / high, rel=0.04)
        assert height * width == pytest.approx(480 * 832, rel=0.04)


def test_the_digest_follows_what_decides_a_sample_and_nothing_else() -> None:
    base = PrepareConfig()
    digest = base.latent_digest("codec")
    for same in ({"deadline_s": 3.0}, {"concurrency": {"decoders": 2}}, {"verify": True}):
        assert PrepareConfig.model_validate(same).latent_digest("codec") == digest
    for other in ({"seed": 1}, {"bucket": {"fps": 4}}, {"filters": {"one_shot": False}}):
        assert PrepareConfig.model_validate(other).latent_digest("codec") != digest
    assert base.latent_digest("another") != digest


def test_digests_are_those_of_every_output_there_is() -> None:
    """A changed digest makes a whole output anew: whoever changes one means to."""
    base = PrepareConfig()
    assert base.latent_digest("codec") == "f4a83edd5020f66b"
    assert base.outcome_digest("codec") == "959f2e68242df5d7"
    assert base.encode_digest("codec") == "640e7adc58cf84c4"
    assert base.caption_digest() == "f74b35fc884eb149"


def test_every_setting_is_documented() -> None:
    def fields(model: Any) -> list[tuple[str, Any]]:
        named = []
        for name, info in model.model_fields.items():
            named.append((name, info))
            if hasattr(info.annotation, "model_fields"):
                named += fields(info.annotation)
        return named

    assert all(info.description for _, info in fields(PrepareConfig))
