"""Tiny vision-language models with random weights, saved as the hub's folders are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant : {% endif %}"
)
WORDS = [
    "a red circle moves left over dark ground", "the blue square stays still",
    "describe this video in one or two plain sentences : who or what is seen , and where .",
    "user assistant picture frames in order green triangle up down right camera light grey",
]  # fmt: skip


def tokenizer_with(specials: list[str], **names: str) -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokens.train_from_iterator(WORDS, trainer)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=names,
    )  # fmt: skip


def save_llava(folder: Path, *, chat: bool = True, seed: int = 0) -> Path:
    """A LLaVA of a few thousand weights: pictures of 32×32 pixels, 16 tokens each."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = tokenizer_with(["<image>"], image_token="<image>")
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>") if chat else None,
    )  # fmt: skip
    size: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=32, patch_size=8),
        text_config=LlamaConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=512),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return _saved(LlavaForConditionalGeneration, config, processor, folder, seed)


def save_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2-VL, whose processor would have a video processor."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tokenizer_with(marks)
    ids = tokenizer.convert_tokens_to_ids
    pictures = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=4096
    )
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e4,
            },
            "bos_token_id": ids("<s>"), "eos_token_id": ids("</s>"), "pad_token_id": ids("<pad>"),
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
            "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        bos_token_id=ids("<s>"),
        eos_token_id=ids("</s>"),
        pad_token_id=ids("<pad>"),
    )  # fmt: skip
    model_class = Qwen2VLForConditionalGeneration
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")

    class Parts:
        """The files of a processor; only config.json names its class, which needs torchvision."""

        def save_pretrained(self, to: Path) -> None:
            pictures.save_pretrained(to)
            tokenizer.chat_template = chat
            tokenizer.save_pretrained(to)

    return _saved(model_class, config, Parts(), folder, seed)


def _saved(model_class: Any, config: Any, processor: Any, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = model_class(config)
    # Larger weights than a fresh model's, so that captions differ from clip to clip.
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
