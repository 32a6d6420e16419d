"""The prompt of a clip: a shape is called by the nearest released name, one frame is an image."""

from __future__ import annotations

import pytest

from flow.aspects import ASPECTS, bucket_size, nearest_aspect, ratio_of
from flow.prompt import EXTEND_PREFIX, prompt_for
from tests.flow.models import tiny_config

TALKATIVE = tiny_config(prompt_fps=True, prompt_aspect=True, prompt_noise=True)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize("target_size", [256, 384, 512, 640])
def test_every_released_bucket_is_called_by_its_own_name(
    aspect: str, multiple: int, target_size: int
) -> None:
    assert nearest_aspect(*bucket_size(target_size, aspect, multiple)) == aspect


@pytest.mark.parametrize(
    ("height", "width", "aspect"),
    [(480, 640, "5:4"), (64, 64, "1:1"), (1080, 1920, "16:9"), (100, 1000, "21:9")],
)
def test_other_shapes_are_called_by_the_nearest_name(height: int, width: int, aspect: str) -> None:
    assert nearest_aspect(height, width) == aspect
    # A shape and the same one turned have names that are turned, too.
    turned = nearest_aspect(width, height)
    assert ratio_of(turned) == pytest.approx(1 / ratio_of(aspect))


def test_a_clip_says_its_rate_its_noise_and_its_shape() -> None:
    prompt = prompt_for(
        "a cat", TALKATIVE, num_frames=17, height=480, width=848, fps=8, prefix=EXTEND_PREFIX
    )
    assert prompt == (
        "Noise Level 300:\nA video with 8 fps:\n(extend) a cat\n\n in a 16:9 aspect ratio.\n"
    )


@pytest.mark.parametrize("video", [True, False])
def test_one_frame_is_an_image_whatever_the_model(video: bool) -> None:
    config = tiny_config(prompt_fps=True, video=video, denoiser=video)
    assert prompt_for("a cat", config, num_frames=1, height=64, width=64, fps=16) == (
        "An image:\na cat\n"
    )


def test_a_model_whose_prompt_states_nothing_reads_the_caption() -> None:
    for num_frames in (1, 17):
        prompt = prompt_for(
            "a cat", tiny_config(), num_frames=num_frames, height=64, width=80, fps=8
        )
        assert prompt == "a cat"
