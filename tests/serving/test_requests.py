"""What is admitted, what is refused and in which words."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from serving.config import Limits
from serving.requests import (
    CreateVideo,
    FrameCountError,
    Generation,
    InvalidRequest,
    ModelFacts,
    QueueFull,
    ServingError,
    check_frames,
    from_validation,
)

FACTS = ModelFacts("tiny", num_frames=17, height=64, width=64, fps=8.0)
LIMITS = Limits(prompt_chars=20, max_frames=33)


def admit(**fields: object) -> Generation:
    body = CreateVideo.model_validate({"prompt": "a red square", **fields})
    return Generation.admit(body, FACTS, LIMITS, request_id="r", seed=5)


def test_a_plain_prompt_gets_the_models_length_and_the_defaults() -> None:
    request = admit()
    assert (request.num_frames, request.latent_frames) == (17, 5)
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


def test_a_model_of_single_frames_makes_no_longer_video() -> None:
    images = ModelFacts("images", num_frames=1, height=64, width=64, fps=8.0)
    body = CreateVideo(prompt="a", num_frames=5)
    with pytest.raises(FrameCountError, match="nearest allowed is 1"):
        Generation.admit(body, images, LIMITS, request_id="r", seed=0)


@pytest.mark.parametrize(
    ("asked", "near"), [(-3, 1), (0, 1), (14, 13), (15, 17), (18, 17), (20, 21)]
)
def test_the_nearest_frame_count_is_named(asked: int, near: int) -> None:
    with pytest.raises(FrameCountError, match=f"nearest allowed is {near}"):
        check_frames(asked)
    check_frames(near)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValidationError) as refused:
        CreateVideo.model_validate({"prompt": "a", "steps": 3})
    error = from_validation(refused.value)
    assert (error.param, error.body()["error"]["message"]) == ("steps", "steps: unknown field.")


@pytest.mark.parametrize("kind", [QueueFull, FrameCountError, ServingError])
def test_errors_survive_pickling(kind: type[ServingError]) -> None:
    error = kind("why", param="seed", retry_after_s=3)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.param, again.retry_after_s) == ("why", "seed", 3)
    assert again.body() == error.body()


def test_requests_survive_pickling() -> None:
    request = admit()
    assert pickle.loads(pickle.dumps(request)) == request


@pytest.mark.parametrize(
    ("height", "width", "aspect"), [(64, 64, "1:1"), (480, 848, "16:9"), (64, 256, "4:1")]
)
def test_aspect_is_named_as_the_prompt_template_names_it(
    height: int, width: int, aspect: str
) -> None:
    assert ModelFacts("m", 17, height, width, 8.0).aspect_ratio == aspect
