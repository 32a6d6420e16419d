"""A tiny T5 that reads bytes, with random weights: what stands in for FLAN-T5-XL in tests."""

from __future__ import annotations

from pathlib import Path

import torch


def byte_t5(folder: Path, width: int = 16) -> Path:
    """Write tokenizer and encoder to `folder`, in the layout of published models.

    The tokenizer is ByT5's, which needs no vocabulary.
    """
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    ByT5Tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder
