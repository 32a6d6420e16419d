"""What is admitted, what is refused and in which words."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from flow.codec_factors import SD_FACTORS, WAN_FACTORS, CodecFactors
from serving.config import Limits
from serving.errors import FrameCountError, InvalidRequest
from serving.requests import (
    CreateVideo,
    Generation,
    ModelFacts,
    check_frames,
    from_validation,
)

FACTS = ModelFacts("tiny", num_frames=17, height=64, width=64, fps=8.0, factors=WAN_FACTORS)
LIMITS = Limits(prompt_chars=20, max_frames=33)


def admit(**fields: object) -> Generation:
    body = CreateVideo.model_validate({"prompt": "a red square", **fields})
    return Generation.admit(body, FACTS, LIMITS, request_id="r", seed=5)


def test_a_plain_prompt_gets_the_models_length_and_the_defaults() -> None:
    request = admit()
    assert (request.num_frames, request.latent_frames(WAN_FACTORS)) == (17, 5)
    assert (request.seed, request.guidance, request.schedule) == (5, 2.5, "jacobi")


def test_openai_seconds_and_size_are_taken_where_they_fit_the_model() -> None:
    assert admit(seconds="4", size="64x64", model="tiny").num_frames == 33


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"prompt": "x" * 21}, "prompt", "21 characters; at most 20"),
        ({"size": "720x1280"}, "size", "'64x64'"),
        ({"model": "sora-2"}, "model", "'tiny'"),
        ({"num_frames": 16}, "num_frames", "nearest allowed is 17"),
        ({"num_frames": 400}, "num_frames", "nearest allowed is 33"),
        ({"seconds": 8}, "seconds", "seconds=4 at 8 fps"),
        ({"seconds": 1, "num_frames": 17}, "seconds", "disagree"),
        ({"guidance": 99}, "guidance", "0 to 20"),
    ],
)
def test_a_field_over_its_limit_is_refused_with_what_is_allowed(
    fields: dict[str, object], param: str, told: str
) -> None:
    with pytest.raises(InvalidRequest, match=r".") as refused:
        admit(**fields)
    assert refused.value.param == param
    assert told in refused.value.message


@pytest.mark.parametrize("factors", [WAN_FACTORS, SD_FACTORS])
def test_a_model_of_single_frames_makes_no_longer_video(factors: CodecFactors) -> None:
    images = ModelFacts("images", num_frames=1, height=64, width=64, fps=8.0, factors=factors)
    body = CreateVideo(prompt="a", num_frames=5)
    with pytest.raises(FrameCountError, match="nearest allowed is 1"):
        Generation.admit(body, images, LIMITS, request_id="r", seed=0)


@pytest.mark.parametrize(
    ("time", "asked", "near"),
    [(4, -3, 1), (4, 0, 1), (4, 14, 13), (4, 15, 17), (4, 18, 17), (4, 20, 21),
     (8, 9, 9), (8, 12, 9), (8, 13, 17), (1, 0, 1), (1, 6, 6)],
)  # fmt: skip
def test_the_nearest_frame_count_of_the_models_own_codec_is_named(
    time: int, asked: int, near: int
) -> None:
    factors = CodecFactors(space=16, time=time)
    check_frames(near, factors)
    if asked != near:
        with pytest.raises(FrameCountError, match=f"nearest allowed is {near}"):
            check_frames(asked, factors)


def test_a_request_that_waited_is_measured_by_the_model_that_now_serves() -> None:
    request = admit(num_frames=13)
    assert request.latent_frames(CodecFactors(space=8, time=12)) == 2
    with pytest.raises(FrameCountError, match=r"counts are 8k\+1; the nearest allowed is 17"):
        request.latent_frames(CodecFactors(space=16, time=8))


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValidationError) as refused:
        CreateVideo.model_validate({"prompt": "a", "steps": 3})
    error = from_validation(refused.value)
    assert (error.param, error.body()["error"]["message"]) == ("steps", "steps: unknown field.")


def test_requests_and_facts_survive_pickling() -> None:
    for value in (admit(), FACTS):
        assert pickle.loads(pickle.dumps(value)) == value
