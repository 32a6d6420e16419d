"""Any image-text-to-text model captions, greedily, and no clip's caption depends on another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.captions.captioner import CaptionerUnavailable
from data_prep.captions.config import CaptionConfig, folder_identity
from data_prep.captions.vlm import (
    VlmCaptioner,
    load_processor,
    render_prompt,
)
from data_prep.config import PrepareConfig
from data_prep.world.draw import random_scene
from data_prep.world.render import render_clip
from tests.data_prep.vlm_models import save_llava, save_qwen2_vl

CLIPS = [render_clip(random_scene(seed), 5, 8.0, 32, 32) for seed in range(5)]
IMAGE = render_clip(random_scene(9), 1, 8.0, 32, 32)
WIDE = render_clip(random_scene(7), 5, 8.0, 32, 64)


@pytest.fixture(scope="module", params=[save_llava, save_qwen2_vl], ids=["llava", "qwen2_vl"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save: Callable[[Path], Path] = request.param
    return save(tmp_path_factory.mktemp("vlm"))


def settings(model_dir: Path, **values: object) -> CaptionConfig:
    base = {"backend": "vlm", "model": str(model_dir), "frames": 3, "max_tokens": 8,
            "batch_size": 4, "dtype": "float32"}  # fmt: skip
    return CaptionConfig.model_validate({**base, **values})


def test_captions_depend_on_the_frames_and_on_nothing_that_came_with_them(model_dir: Path) -> None:
    captioner = VlmCaptioner(settings(model_dir))
    clips = [*CLIPS, IMAGE, WIDE]
    together = captioner.caption_all(clips)
    assert not any(written.error for written in together)
    assert len({written.text for written in together}) > 3
    assert [captioner.caption_all([clip])[0] for clip in clips] == together
    assert captioner.caption_all(clips[::-1]) == together[::-1]
    assert VlmCaptioner(settings(model_dir)).caption_all(clips) == together


def test_a_clip_gives_the_same_bits_in_any_place_beside_any_neighbours(model_dir: Path) -> None:
    captioner = VlmCaptioner(settings(model_dir))

    def logits(clips: list[np.ndarray], place: int) -> torch.Tensor:
        with torch.inference_mode():
            return captioner.model(**captioner.inputs(clips)).logits[place]

    first = logits([CLIPS[0]] * 4, 0)
    assert torch.equal(first, logits([CLIPS[1], CLIPS[2], CLIPS[0], CLIPS[3]], 2))
    assert torch.equal(first, logits([CLIPS[4], CLIPS[4], CLIPS[4], CLIPS[0]], 3))
    assert not torch.equal(first, logits([CLIPS[1]] * 4, 0))


def test_decoding_is_greedy_whatever_the_model_asks_for(model_dir: Path, tmp_path: Path) -> None:
    sampling = shutil.copytree(model_dir, tmp_path / "sampling")
    from transformers import GenerationConfig

    wishes = GenerationConfig.from_pretrained(sampling)
    wishes.update(do_sample=True, temperature=5.0, top_k=100)
    wishes.save_pretrained(sampling)
    captioner = VlmCaptioner(settings(sampling))
    assert captioner.caption_all(CLIPS) == VlmCaptioner(settings(model_dir)).caption_all(CLIPS)


def test_the_question_and_as_many_images_as_frames_are_asked_for_are_in_the_prompt(
    model_dir: Path,
) -> None:
    config = settings(model_dir, prompt="what moves", image_prompt="what is it")
    processor = load_processor(config)
    mark = "<image>" if "<image>" in processor.tokenizer.get_vocab() else "<|image_pad|>"
    clip, image = render_prompt(processor, config, 5), render_prompt(processor, config, 1)
    assert (clip.count(mark), image.count(mark)) == (3, 1)
    assert "what moves" in clip
    assert "what is it" in image


@pytest.mark.parametrize("break_it", ["no template", "no model", "no folder"])
def test_a_model_that_cannot_caption_is_named_with_what_to_do(
    tmp_path: Path, break_it: str
) -> None:
    folder = tmp_path / "model"
    words = {
        "no template": "no chat template",
        "no model": "cannot load",
        "no folder": "cannot load",
    }
    if break_it == "no template":
        save_llava(folder, chat=False)
    elif break_it == "no model":
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    with pytest.raises(CaptionerUnavailable, match=words[break_it]) as caught:
        VlmCaptioner(settings(folder))
    assert "captioner.model" in str(caught.value)


def test_other_weights_or_words_are_another_captioner_and_another_place_is_not(
    model_dir: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    (moved / ".cache").mkdir()
    (moved / ".cache" / "x").write_text("download")

    def digest(**values: object) -> str:
        folder = Path(str(values.pop("folder", model_dir)))
        return PrepareConfig(captioner=settings(folder, **values)).caption_digest()

    assert digest(folder=moved) == digest()
    for change in ({"prompt": "other"}, {"frames": 2}, {"max_tokens": 9}, {"batch_size": 5}):
        assert digest(**change) != digest()
    assert digest(retries=9, deadline_s=1.0, give_up_after=2) == digest()
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert digest(folder=moved) != digest()
    assert folder_identity(moved) != folder_identity(model_dir)
