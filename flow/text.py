"""Text encoders: they turn a prompt (`flow.prompt` writes it) into vectors.

Two encoders stand behind one `encode`: `hashed` (deterministic word vectors without weights, for
laptops and tests) and `t5` (FLAN-T5-XL for the released models, any T5 by id or folder). Knows
nothing of flows or videos.

Shapes: B texts, J text tokens (`TextSpec.length`), E text width (`TextSpec.dim`).
"""

from __future__ import annotations

import hashlib
import re
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flow.text_spec import TextError, TextSpec


class TextEncoder(Protocol):
    """What every encoder offers."""

    spec: TextSpec

    def encode(self, texts: list[str]) -> Tensor:
        """Vectors of the texts, fp32 [B, J, E]; zero where there is no token."""
        ...


def without_padding(text_JE: Tensor) -> Tensor:
    """The vectors of a text up to its last token, copied: [N, E] of [J, E].

    Encoders leave zeros where there is no token, so that zeros put back give the same tensor.

    >>> without_padding(torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])).shape
    torch.Size([3, 2])
    """
    used = text_JE.any(dim=-1).nonzero()
    return text_JE[: int(used[-1]) + 1 if len(used) else 0].clone()


class HashedText:
    """Each word (or punctuation mark) is a fixed random vector, drawn from the word's own hash.

    The same text gives the same vectors on every machine. Words beyond `length` are dropped.

    >>> encoder = HashedText(TextSpec("hashed", length=4, dim=8))
    >>> text_BJE = encoder.encode(["a red circle", ""])
    >>> text_BJE.shape, int(text_BJE[0].any(-1).sum()), bool(text_BJE[1].any())
    (torch.Size([2, 4, 8]), 3, False)
    """

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        self._vectors: dict[str, np.ndarray] = {}

    def _vector(self, word: str) -> np.ndarray:
        if word not in self._vectors:
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            rng = np.random.Generator(np.random.Philox(int.from_bytes(digest, "big")))
            self._vectors[word] = rng.standard_normal(self.spec.dim).astype(np.float32)
        return self._vectors[word]

    def encode(self, texts: list[str]) -> Tensor:
        """As `TextEncoder.encode`."""
        out = np.zeros((len(texts), self.spec.length, self.spec.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+|[^\w\s]", text.lower())[: self.spec.length]
            for column, word in enumerate(words):
                out[row, column] = self._vector(word)
        return torch.from_numpy(out)


class T5Text:
    """Last hidden state of a T5 encoder, zero at the padding.

    The released models read FLAN-T5-XL: `docs/design.md`, "The model exactly", conditioning text.
    """

    def __init__(self, spec: TextSpec, device: str | torch.device = "cpu") -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        assert spec.path is not None
        self.spec = spec
        self.device = torch.device(device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(spec.path)
            self.model = T5EncoderModel.from_pretrained(spec.path).eval().to(self.device)
        except OSError as error:
            raise TextError(
                f"no T5 at {spec.path!r} ({str(error).splitlines()[0]}); "
                "give text.path a folder with its tokenizer and weights, or an id a hub answers to"
            ) from error
        width = self.model.config.d_model
        if width != spec.dim:
            raise TextError(f"text.dim is {spec.dim}, but {spec.path} makes vectors of {width}")

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Tensor:
        """As `TextEncoder.encode`."""
        batch = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.spec.length,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model(**batch).last_hidden_state.float()
        return (hidden * batch["attention_mask"][..., None]).cpu()


def build_text_encoder(spec: TextSpec, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder that a spec names.

    Raises:
        TextError: no T5 is where the spec says, or it makes vectors of another width.
    """
    return HashedText(spec) if spec.kind == "hashed" else T5Text(spec, device)
