"""What is read of a model folder, and which folders are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flow.codec_factors import CodecFactors
from serving.errors import InvalidRequest
from serving.loading import LoadedModel, load, load_codec, model_facts
from tests.serving.conftest import FPS, SIZE, TRAINED_FRAMES


def test_facts_and_factors_are_those_of_the_models_config(loaded: LoadedModel) -> None:
    facts = loaded.facts
    assert (facts.name, facts.num_frames, facts.fps) == ("tiny", TRAINED_FRAMES, FPS)
    assert facts.factors == CodecFactors(space=16, time=4)
    assert loaded.latent_grid == (SIZE // 16, SIZE // 16)
    video = replace(loaded.spec.video, cell_pixels=8, latent_every=2)
    other = model_facts(replace(loaded.spec, video=video), "other")
    assert other.factors == CodecFactors(space=8, time=2)


@pytest.mark.parametrize("missing", ["video", "codec"])
def test_a_model_that_does_not_say_what_it_makes_is_refused(
    loaded: LoadedModel, missing: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"'m' names no {missing} in its config.json"):
        model_facts(replace(loaded.spec, **{missing: None}), "m")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cell_pixels": 8}, "of 16 pixels and 4 frames; the model reads 4 of 8 pixels"),
        ({"latent_every": 2}, "of 16 pixels and 4 frames; the model reads 4 of 16 pixels and 2 f"),
    ],
)
def test_a_codec_of_other_factors_than_the_models_is_refused(
    loaded: LoadedModel, model_dir: Path, changes: dict[str, int], told: str
) -> None:
    spec = replace(loaded.spec, video=replace(loaded.spec.video, **changes))
    with pytest.raises(InvalidRequest, match=told):
        load_codec(model_dir, spec, "cpu")


def test_a_codec_that_is_not_the_one_trained_with_is_refused(
    loaded: LoadedModel, model_dir: Path
) -> None:
    with pytest.raises(InvalidRequest, match="put that codec back"):
        load_codec(model_dir, replace(loaded.spec, codec_digest="0" * 16), "cpu")


def test_each_deployment_holds_only_what_it_needs(loaded: LoadedModel, model_dir: Path) -> None:
    def size(part: LoadedModel) -> int:
        return sum(weight.numel() for weight in part.model.parameters())

    deep, decode = (load(model_dir, deployment=name) for name in ("deep", "decode"))
    assert (deep.codec, decode.text_encoder) == (None, None)
    assert size(deep) + size(decode) < 1.1 * size(loaded)
