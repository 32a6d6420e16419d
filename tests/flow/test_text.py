"""The prompt template against the released one, and the hashed encoder's laws."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from flow.text import TextError, TextSpec, build_text_encoder, format_prompt

GOLDENS = Path(os.environ.get("FLOWREEL_GOLDENS", Path(__file__).parents[3] / "shared" / "goldens"))


def test_prompts_read_as_the_released_model_was_trained_to_read_them() -> None:
    path = GOLDENS / "conditioning.json"
    if not path.is_file():
        pytest.skip(f"no {path}; set FLOWREEL_GOLDENS")
    cases = json.loads(path.read_text())["prompts"]
    assert cases
    for case in cases:
        expected = case.pop("expected")
        assert format_prompt(**case) == expected


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
