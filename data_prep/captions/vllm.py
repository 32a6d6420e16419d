"""Captions by vLLM as a stage of Ray Data's own (`ray.data.llm`): settings, rows in and out.

The chat template is rendered before the engine and the frames go as images, as in
`data_prep.captions.vlm`; so of Ray's stages only the engine's is used. Rows that want no caption
are marked as failed for the engine, and Ray hands those through untouched. Knows nothing of Ray or
vLLM: `data_prep.captions.on_ray` wires them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.captions.captioner import CaptionResult, shown_images
from data_prep.captions.config import CaptionConfig
from data_prep.row import Row, frames_of, wants_caption

ERROR = "__inference_error__"
"""Ray's column: rows where it is not empty pass every stage untouched."""
PASSED = "decided before captioning"


def vllm_gpus(config: CaptionConfig) -> int:
    """GPUs of one engine.

    >>> engine = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    >>> vllm_gpus(CaptionConfig(backend="vllm", model="owner/model", engine=engine))
    4
    """
    sizes = (config.engine.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    return int(np.prod([int(size) for size in sizes]))


def vllm_settings(config: CaptionConfig, *, engines: int, seed: int) -> dict[str, Any]:
    """Arguments of `ray.data.llm.vLLMEngineProcessorConfig`.

    Args:
        config: the settings.
        engines: how many engines run at once.
        seed: the run's seed.
    """
    engine = {
        "dtype": config.dtype,
        "seed": seed,
        "limit_mm_per_prompt": {"image": config.frames},
        **({"revision": config.revision} if config.revision else {}),
        **config.engine,
    }
    # Without this a caption's last bits, and so its words, depend on the rest of the batch.
    invariant = {"VLLM_BATCH_INVARIANT": "1"} if config.batch_invariant else {}
    stages = ("chat_template", "tokenize", "detokenize", "prepare_multimodal")
    return {
        "model_source": config.model,
        "engine_kwargs": engine,
        "batch_size": config.batch_size,
        "concurrency": engines,
        "should_continue_on_error": True,
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": invariant},
        **{f"{stage}_stage": False for stage in stages},
    }


def engine_row(
    row: Row, config: CaptionConfig, prompts: Mapping[int, str], seed: int
) -> dict[str, Any]:
    """What the engine reads of a row: prompt, images, greedy sampling.

    Args:
        row: a row of ROW_SCHEMA.
        config: the settings.
        prompts: the rendered chat by number of images.
        seed: the run's seed.
    """
    if not wants_caption(row):
        # An image all the same: blocks with images and blocks without would be of different kinds.
        blank = shown_images(np.zeros((1, 1, 1, 3), dtype=np.uint8), 1)
        return {"prompt": "", "multimodal_data": {"image": blank}, ERROR: PASSED}
    images = shown_images(frames_of(row), config.frames)
    return {
        "prompt": prompts[len(images)],
        "multimodal_data": {"image": images},
        "sampling_params": {"temperature": 0.0, "max_tokens": config.max_tokens, "seed": seed},
        ERROR: "",
    }


def engine_result(row: Mapping[str, Any]) -> tuple[bool, CaptionResult]:
    """Whether a row went through the engine, and what the engine made of it."""
    error = row.get(ERROR) or ""
    if error == PASSED:
        return False, CaptionResult("")
    if error:
        return True, CaptionResult.failed("engine_error", error)
    return True, CaptionResult.of(row.get("generated_text") or "")
