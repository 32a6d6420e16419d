"""The prompt template against the released one, and the hashed encoder's laws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flow.aspects import ASPECTS, SizeError, bucket_size
from flow.prompt import (
    EXTEND_PREFIX,
    LAST_PREFIX,
    VIDEO_TO_VIDEO_PREFIX,
    format_prompt,
)
from flow.text import (
    TextError,
    TextSpec,
    build_text_encoder,
)
from tests.flow.tiny_t5 import byte_t5
from tests.places import ROOT

LARGER = Path(os.environ.get("FLOWREEL_GOLDENS") or ROOT.parent / "shared" / "goldens")

PROMPTS = [
    (
        {"fps": 16, "noise_std": 0.5, "aspect_ratio": "16:9"},
        "Noise Level 500:\nA video with 16 fps:\nTWO BOATS\n\n in a 16:9 aspect ratio.\n",
    ),
    (
        {"fps": 0, "noise_std": 0.3, "aspect_ratio": "1:1"},
        "Noise Level 300:\nAn image:\nTWO BOATS\n\n in a 1:1 aspect ratio.\n",
    ),
    (
        {"fps": 24, "aspect_ratio": "9:16"},
        "A video with 24 fps:\nTWO BOATS\n\n in a 9:16 aspect ratio.\n",
    ),
    ({"fps": 8, "noise_std": 0.25}, "Noise Level 250:\nA video with 8 fps:\nTWO BOATS\n"),
    ({}, "TWO BOATS"),
]
"""What a caption becomes by what is said with it; TWO BOATS stands for the caption."""


@pytest.mark.parametrize("caption", ["two boats at sea", ""])
@pytest.mark.parametrize(("facts", "expected"), PROMPTS)
def test_prompts_read_as_the_released_model_was_trained_to_read_them(
    caption: str, facts: dict[str, Any], expected: str
) -> None:
    assert format_prompt(caption, **facts) == expected.replace("TWO BOATS", caption)


BUCKETS = {
    "1:1": (640, 640),
    "2:3": (784, 528),
    "3:2": (528, 784),
    "16:9": (480, 848),
    "9:16": (848, 480),
    "4:5": (720, 576),
    "5:4": (576, 720),
    "21:9": (416, 976),
    "9:21": (976, 416),
}
"""Height and width of the released 480p buckets, 16 pixels to a latent cell."""


def test_buckets_have_the_released_sizes() -> None:
    assert {name: bucket_size(640, name, 16) for name in ASPECTS} == BUCKETS
    assert bucket_size(256, "2:3", 8) == (312, 208)


@pytest.mark.skipif(
    not (LARGER / "conditioning.json").is_file(),
    reason=f"no conditioning.json in {LARGER}; set FLOWREEL_GOLDENS to a folder that has it",
)
def test_every_prompt_and_size_of_the_larger_cases_agrees() -> None:
    cases = json.loads((LARGER / "conditioning.json").read_text())
    # Nothing in the file goes unread: its parts are named here.
    assert cases.keys() == {"prompts", "sizes", "task_prefixes"}
    assert len(cases["prompts"]) >= 12
    for case in cases["prompts"]:
        expected = case.pop("expected")
        assert format_prompt(**case) == expected
    assert len(cases["sizes"]) >= 72
    for case in cases["sizes"]:
        expected = case.pop("height"), case.pop("width")
        assert bucket_size(**case) == expected, case
    assert set(cases["task_prefixes"].values()) == {
        EXTEND_PREFIX,
        LAST_PREFIX,
        VIDEO_TO_VIDEO_PREFIX,
    }


def test_task_prefixes_are_the_released_ones() -> None:
    prefixes = (EXTEND_PREFIX, LAST_PREFIX, VIDEO_TO_VIDEO_PREFIX)
    assert prefixes == ("(extend) ", "(last) ", "(v2v) ")


def test_task_prefixes_stand_before_the_caption_inside_the_template() -> None:
    prompt = format_prompt("a cat", fps=8, prefix=EXTEND_PREFIX)
    assert prompt == "A video with 8 fps:\n(extend) a cat\n"


@pytest.mark.parametrize("aspect", ["16/9", "16", "0:1", "a:b", "1:-2"])
def test_aspects_that_are_none_are_refused(aspect: str) -> None:
    with pytest.raises(SizeError, match="WIDTH:HEIGHT"):
        bucket_size(256, aspect, 8)
    with pytest.raises(SizeError, match="target_size 4"):
        bucket_size(4, "1:1", 8)


def test_hashed_words_are_the_same_everywhere_and_padding_is_zero() -> None:
    encoder = build_text_encoder(TextSpec("hashed", 6, 8))
    text = encoder.encode(["A red circle", "a RED square moves left over there and on"])
    assert text.shape == (2, 6, 8)
    assert text.dtype == torch.float32
    assert torch.equal(text[0, :2], text[1, :2])
    assert not torch.equal(text[0, 2], text[1, 2])
    assert torch.all(text[0, 3:] == 0)
    # A fixed value: the vectors must not move when Python, numpy or the machine does.
    torch.testing.assert_close(text[0, 1, :2], torch.tensor(RED), atol=1e-5, rtol=0)


RED = [0.443757, 0.066995]


def test_specs_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(TextError, match="'hashed', 't5'"):
        TextSpec("bert")
    with pytest.raises(TextError, match=r"text\.path"):
        TextSpec("t5")
    with pytest.raises(TextError, match="no T5 at"):
        build_text_encoder(TextSpec("t5", 8, 16, path="./no-such-folder"))


def test_t5_is_read_from_a_folder_and_padding_is_zeroed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = T5Config(vocab_size=5, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    encoder = build_text_encoder(TextSpec("t5", 5, 16, path=str(tmp_path)))
    text = encoder.encode(["red circle", "red"])
    assert text.shape == (2, 5, 16)
    assert torch.all(text[1, 1:] == 0)
    assert torch.all(text[0, :2].abs().sum(-1) > 0)
    with pytest.raises(TextError, match="vectors of 16"):
        build_text_encoder(TextSpec("t5", 5, 32, path=str(tmp_path)))


def test_byte_level_t5_reads_every_prompt_as_the_model_alone_does(tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    encoder = build_text_encoder(TextSpec("t5", 24, 16, path=str(byte_t5(tmp_path))))
    texts = ["a red circle", "ein großer Kreis", "", "x" * 90]
    text = encoder.encode(texts)
    assert text.shape == (4, 24, 16)
    assert text.dtype == torch.float32
    model = T5EncoderModel.from_pretrained(tmp_path).eval()
    for row, words in enumerate(texts):
        # ByT5's code: bytes shifted by its three special tokens; an end mark (1) outlives the cut.
        tokens = [*[byte + 3 for byte in words.encode()][:23], 1]
        with torch.no_grad():
            alone = model(torch.tensor([tokens])).last_hidden_state[0]
        # Padding is masked: alone or padded, with others or not, the same vectors.
        torch.testing.assert_close(text[row, : len(tokens)], alone, atol=1e-5, rtol=1e-4)
        assert torch.all(text[row, len(tokens) :] == 0)
    assert not torch.equal(text[0, 2:4], text[0, 8:10])


def test_t5_by_hub_id_comes_from_the_hubs_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--google--flan-t5-xl"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    byte_t5(repository / "snapshots" / "0123abc")
    code = (
        "from flow.text import TextSpec, build_text_encoder\n"
        "encoder = build_text_encoder(TextSpec('t5', 8, 16, path='google/flan-t5-xl'))\n"
        "text = encoder.encode(['a cat'])\n"
        "print(tuple(text.shape), bool(text[0, 6:].any()))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.split("\n")[0] == "(1, 8, 16) False"
