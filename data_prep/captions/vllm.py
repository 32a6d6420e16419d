"""Captions by vLLM as a stage of Ray Data's own (`ray.data.llm`): its settings, and rows in and out.

The chat template is rendered here and the frames go as images, as in `caption_vlm`, so of Ray's
stages only the engine's is used. Rows that were decided before are marked as failed for the engine,
which Ray hands through untouched. Knows neither Ray nor vLLM: `data_prep.on_ray` wires them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.captions.captioner import (
    Frames,
    Written,
    shown_images,
)
from data_prep.captions.config import CaptionConfig

ERROR = "__inference_error__"
"""Ray's column: rows where it is not empty pass every stage untouched."""
PASSED = "decided before captioning"


def vllm_gpus(config: CaptionConfig) -> int:
    """GPUs of one engine."""
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
    # Without it a caption's last bits, and so its words, depend on what else is in the batch.
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
    row: Mapping[str, Any], config: CaptionConfig, prompts: Mapping[int, str], seed: int
) -> dict[str, Any]:
    """What the engine reads of a row: prompt, images, greedy sampling.

    Args:
        row: a row of `stages.ROW_SCHEMA`.
        config: the settings.
        prompts: the rendered chat by number of images.
        seed: the run's seed.
    """
    if row["status"] or row["number"] < 0 or row["synthetic"] is not None:
        # An image all the same: Arrow could hold the row without, and blocks must be of one kind.
        blank = shown_images(np.zeros((1, 1, 1, 3), dtype=np.uint8), 1)
        return {"prompt": "", "multimodal_data": {"image": blank}, ERROR: PASSED}
    frames: Frames = np.frombuffer(row["frames"], dtype=np.uint8).reshape(row["frames_shape"])
    images = shown_images(frames, config.frames)
    return {
        "prompt": prompts[len(images)],
        "multimodal_data": {"image": images},
        "sampling_params": {"temperature": 0.0, "max_tokens": config.max_tokens, "seed": seed},
        ERROR: "",
    }


def engine_result(row: Mapping[str, Any]) -> tuple[bool, Written]:
    """(whether the row was captioned, what the engine made of it)."""
    error = row.get(ERROR) or ""
    if error == PASSED:
        return False, Written("")
    if error:
        return True, Written.failed("engine_error", error)
    return True, Written.of(row.get("generated_text") or "")
