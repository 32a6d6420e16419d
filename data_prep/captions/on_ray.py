"""Captions by vLLM as a stage of Ray Data: only the wiring. Its rows are `data_prep.captions.vllm`.

Knows nothing of what makes a sample good or bad.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from data_prep.captions.captioner import captioner_name
from data_prep.captions.stage import with_caption
from data_prep.captions.vllm import engine_result, engine_row, vllm_settings
from data_prep.config import PrepareConfig
from data_prep.row import ROW_SCHEMA, table_of

_ROW_NAMES = tuple(ROW_SCHEMA.names)
_AROUND_CPUS = 0.1
"""CPUs of the steps around an engine: they only move rows."""


def caption_with_vllm(rows: Dataset, config: PrepareConfig, *, engines: int) -> Dataset:
    """The rows captioned by `engines` vLLM engines, a GPU stage of `ray.data.llm`."""
    processor = vllm_processor(config, engines=engines)
    name = captioner_name(config.captioner)
    return processor(rows).map_batches(
        partial(_captioned, name=name),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=_AROUND_CPUS,
    )


def vllm_processor(config: PrepareConfig, *, engines: int) -> Any:
    """Ray's processor for the captioner's settings; needs the model's processor, not vLLM."""
    # Imported here, because both are heavy and every other captioner does without them.
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from data_prep.captions.vlm import load_processor, render_prompt

    captioner = config.captioner
    settings = vllm_settings(captioner, engines=engines, seed=config.seed)
    tokens = load_processor(captioner)
    prompts = {n: render_prompt(tokens, captioner, n) for n in range(1, captioner.frames + 1)}
    share = {"num_cpus": _AROUND_CPUS}
    return build_processor(
        vLLMEngineProcessorConfig(**settings),
        preprocess=lambda row: engine_row(row, captioner, prompts, config.seed),
        postprocess=lambda row: {name: row.get(name) for name in (*_ROW_NAMES, "generated_text")},
        preprocess_map_kwargs=share,
        postprocess_map_kwargs=share,
    )


def _captioned(batch: pa.Table, *, name: str) -> Iterator[pa.Table]:
    """Rows as the engine leaves them → rows of ROW_SCHEMA with captions."""
    for row in batch.to_pylist():
        was_asked, result = engine_result(row)
        row = {column: row.get(column) for column in _ROW_NAMES}
        yield table_of([with_caption(row, result, name) if was_asked else row])
