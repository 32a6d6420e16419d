"""Captions by a vision-language model: any `AutoModelForImageTextToText` with a chat template.

Decoding is greedy, and every call has one shape: `batch_size` clips of one size, where a short call
is filled up with its own clips. So the same kernels run whatever arrived together, and a clip's
caption does not depend on its neighbours. (Models that route tokens among experts are an exception:
give those `batch_size: 1`.) Knows nothing of Ray or endpoints, and reads no files but the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from data_prep.captions.captioner import (
    CaptionerUnavailable,
    CaptionResult,
    captioner_name,
    chat_messages,
    shown_images,
)
from data_prep.captions.config import CaptionConfig
from media.frames import Frames


class VlmCaptioner:
    """A transformers model in this process.

    Args:
        config: the settings; `model` is a folder or a hub id.
        device: torch device.

    Raises:
        CaptionerUnavailable: the model or its processor cannot be loaded, or has no chat template.
    """

    def __init__(self, config: CaptionConfig, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(config.threads)
        self.config = config
        self.name = captioner_name(config)
        self.processor = load_processor(config)
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                config.model, dtype=getattr(torch, config.dtype), **_where(config)
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise CaptionerUnavailable(_cannot_load(config, error)) from error
        self.model = model.to(device).eval()
        settings = self.model.generation_config
        # A model's own settings may ask for sampling; its stop tokens are kept.
        settings.update(
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            max_length=None, max_new_tokens=config.max_tokens,
        )  # fmt: skip
        if settings.pad_token_id is None:
            pad = self.processor.tokenizer.pad_token_id
            settings.pad_token_id = (
                pad if pad is not None else self.processor.tokenizer.eos_token_id
            )

    def caption_all(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        """A caption for every clip, in calls of one shape."""
        results: dict[int, CaptionResult] = {}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, frames in enumerate(clips):
            by_shape.setdefault(frames.shape, []).append(place)
        size = self.config.batch_size
        for places in by_shape.values():
            for start in range(0, len(places), size):
                call = places[start : start + size]
                filled = [clips[call[i % len(call)]] for i in range(size)]
                results.update(zip(call, self._generate(filled), strict=False))
        return [results[place] for place in range(len(clips))]

    def close(self) -> None:
        """Do nothing: it holds nothing but memory."""

    def inputs(self, clips: Sequence[Frames]) -> Any:
        """What the model reads of clips of one shape: token ids [B, L], pixels, and so on."""
        prompt = render_prompt(self.processor, self.config, len(clips[0]))
        return self.processor(
            images=[shown_images(frames, self.config.frames) for frames in clips],
            text=[prompt] * len(clips),
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def _generate(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        """One call; `clips` has `batch_size` clips of one shape."""
        inputs = self.inputs(clips)
        tokens_BL = self.model.generate(**inputs)
        new_BL = tokens_BL[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new_BL, skip_special_tokens=True)
        return [CaptionResult.of(text) for text in texts]


def render_prompt(processor: Any, config: CaptionConfig, num_frames: int) -> str:
    """The model's chat template around the question about a clip of so many frames."""
    text: str = processor.apply_chat_template(
        chat_messages(config, num_frames), tokenize=False, add_generation_prompt=True
    )
    # Templates write the first token themselves, and so does the tokenizer: it would come twice.
    first = getattr(processor.tokenizer, "bos_token", None)
    return text.removeprefix(first) if first and _adds_first(processor.tokenizer) else text


def _adds_first(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def load_processor(config: CaptionConfig) -> Any:
    """The model's processor for text and images.

    A video processor that the model may have is left out: it needs torchvision, and frames are
    shown as images.

    Raises:
        CaptionerUnavailable: there is none to load, or it has no chat template.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    where = _where(config)
    try:
        model_config = AutoConfig.from_pretrained(config.model, **where)
        processor_class = PROCESSOR_MAPPING.get(type(model_config), None)
        kind = _without_video(processor_class) if processor_class is not None else AutoProcessor
        processor = kind.from_pretrained(config.model, **where)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise CaptionerUnavailable(_cannot_load(config, error)) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise CaptionerUnavailable(
            f"captioner.model {config.model!r} does not read images and text; "
            "choose a vision-language model (image-text-to-text)"
        )
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise CaptionerUnavailable(
            f"captioner.model {config.model!r} has no chat template; choose a model tuned for chat"
        )
    if not getattr(processor, "chat_template", None):
        processor.chat_template = tokenizer.chat_template
    tokenizer.padding_side = "left"
    return processor


def _where(config: CaptionConfig) -> dict[str, Any]:
    """Which files of the model are read; code that comes with it never runs."""
    revision = {"revision": config.revision} if config.revision else {}
    return {**revision, "trust_remote_code": False}


def _without_video(kind: type) -> Any:
    """The processor class as one that neither loads nor needs a video processor."""
    every = kind.get_attributes()  # type: ignore[attr-defined]
    if "video_processor" not in every:
        return kind
    names = [name for name in every if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: names)})


def _cannot_load(config: CaptionConfig, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"cannot load captioner.model {config.model!r} ({type(error).__name__}: {reason}); give a "
        "folder or hub id of an image-text-to-text model that this transformers knows"
    )
