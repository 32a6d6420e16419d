"""One clip reads alike through all four doors: training, the service, sampling, likelihood."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.latents.records import Bucket
from flow.aspects import ASPECTS, bucket_size
from flow.codec_factors import WAN_FACTORS
from flow.prompt import EXTEND_PREFIX, prompt_for
from flow.text import TextSpec
from pipeline.make_video import request_for
from pipeline.video_likelihood import measure_likelihood
from serving.config import Limits
from serving.loading import LoadedModel
from serving.requests import Generation, ModelFacts
from serving.session import DeepSession, generate
from tests.flow.models import tiny_model
from training.data.batches import Prompts

FPS = 16.0
CAPTION = "a corgi looks at the camera"
SIZES = {
    **{f"{side}:{name}": bucket_size(side, name, 16) for side in (640, 512) for name in ASPECTS},
    "odd 480x640": (480, 640),
    "odd 96x64": (96, 64),
    "odd 64x512": (64, 512),
}


class Asked(Exception):
    """The encoder was asked; nothing behind it is needed."""


class Recording:
    """A text encoder that remembers what it is asked to read, and goes no further."""

    spec = TextSpec("hashed", 6, 16)

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: list[str]) -> Tensor:
        self.texts = list(texts)
        raise Asked


class BlankCodec:
    """Latents of a clip without the work: what a door reads does not depend on them."""

    factors = WAN_FACTORS

    def encode(self, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        blank = torch.zeros(1, 1, 4, 1, 1)
        return blank, blank


def model_of(size: tuple[int, int], num_frames: int) -> LoadedModel:
    """A tiny model whose prompts say everything, made for clips of this size."""
    told = {"prompt_fps": True, "prompt_aspect": True, "prompt_noise": True}
    model = tiny_model(torch.float32, **told)
    facts = ModelFacts("tiny", max(num_frames, 17), *size, FPS, WAN_FACTORS)
    return LoadedModel(model, None, facts, "cpu", BlankCodec(), Recording())  # type: ignore[arg-type]


def through_training(loaded: LoadedModel, num_frames: int) -> str:
    prompts = Prompts(Recording(), loaded.model.config, FPS)
    bucket = Bucket(num_frames, loaded.facts.height, loaded.facts.width)
    return prompts.format(CAPTION, bucket, "image" if num_frames == 1 else "video")


def through_the_service(loaded: LoadedModel, num_frames: int) -> list[str]:
    request = Generation(request_id="a", prompt=CAPTION, num_frames=num_frames)
    with pytest.raises(Asked):
        DeepSession(loaded, request)
    return loaded.text_encoder.texts  # type: ignore[union-attr]


def through_sampling(loaded: LoadedModel, num_frames: int) -> list[str]:
    request = request_for(
        loaded,
        Limits(),
        CAPTION,
        num_frames=num_frames,
        seed=0,
        guidance=None,
        schedule="sliding",
        given_first_frame=False,
    )
    with pytest.raises(Asked):
        generate(loaded, request)
    return loaded.text_encoder.texts  # type: ignore[union-attr]


def through_likelihood(loaded: LoadedModel, num_frames: int) -> list[str]:
    frames = np.zeros((num_frames, loaded.facts.height, loaded.facts.width, 3), dtype=np.uint8)
    with pytest.raises(Asked):
        measure_likelihood(loaded, frames, CAPTION)
    return loaded.text_encoder.texts  # type: ignore[union-attr]


@pytest.mark.parametrize("num_frames", [1, 17, 81])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_clip_reads_alike_through_all_four_doors(size: tuple[int, int], num_frames: int) -> None:
    loaded = model_of(size, num_frames)
    config = loaded.model.config
    shape = {"num_frames": num_frames, "height": size[0], "width": size[1], "fps": FPS}
    expected, null = (prompt_for(text, config, **shape) for text in (CAPTION, ""))
    assert through_training(loaded, num_frames) == expected
    assert through_the_service(loaded, num_frames) == [expected, null]
    assert through_sampling(loaded, num_frames) == [expected, null]
    assert through_likelihood(loaded, num_frames) == [expected]


def test_one_frame_of_a_video_model_is_an_image_and_a_named_aspect_is_said() -> None:
    config = model_of((480, 640), 1).model.config
    one = prompt_for(CAPTION, config, num_frames=1, height=480, width=640, fps=FPS)
    many = prompt_for(CAPTION, config, num_frames=17, height=480, width=640, fps=FPS)
    assert "An image:" in one
    assert "A video with 16 fps:" in many
    assert "5:4 aspect ratio" in one
    assert "5:4 aspect ratio" in many


def test_a_model_is_told_only_what_it_was_trained_to_read() -> None:
    config = tiny_model(torch.float32).config
    shape = {"num_frames": 17, "height": 64, "width": 64, "fps": FPS}
    assert prompt_for(CAPTION, config, **shape) == CAPTION
    told = replace(config, prompt_fps=True)
    extended = prompt_for(CAPTION, told, **shape, prefix=EXTEND_PREFIX)
    assert extended == f"A video with 16 fps:\n(extend) {CAPTION}\n"
