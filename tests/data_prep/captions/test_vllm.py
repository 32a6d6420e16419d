"""vLLM through ray.data.llm: everything but the engine, which needs a GPU and is stood in for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from data_prep.captions import on_ray as captions_on_ray
from data_prep.captions.captioner import CaptionerUnavailable
from data_prep.captions.config import CaptionConfig
from data_prep.captions.vllm import engine_row, vllm_gpus
from data_prep.config import ConcurrencyConfig, PrepareConfig
from data_prep.on_ray import prepare
from data_prep.resources import ResourceError, needed_concurrency, plan_resources
from data_prep.row import ROW_SCHEMA
from tests.data_prep.vlm_models import save_llava


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> CaptionConfig:
    model = save_llava(tmp_path_factory.mktemp("vlm"))
    return CaptionConfig(
        backend="vllm", model=str(model), frames=3, max_tokens=12, batch_size=16, prompt="What?",
        image_prompt="Which?", engine={"tensor_parallel_size": 2, "max_model_len": 4096},
    )  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Five clips, one of them decided, a picture, and a closing row."""
    clips = []
    for number in range(6):
        length = 1 if number == 4 else 5
        # Trailing zeros are what a careless conversion of bytes loses.
        frames = np.full((length, 32, 32, 3), number, dtype=np.uint8)
        frames[-1, -1] = 0
        clips.append(
            {"shard": "s", "number": number, "key": f"k{number}", "status": "", "reason": "",
             "frames": frames.tobytes(), "frames_shape": list(frames.shape), "caption": "o"}
        )  # fmt: skip
    clips[3] |= {"status": "dropped", "reason": "small_area", "frames": None}
    clips.append({"shard": "s", "number": -1, "key": "", "status": "", "closing": "{}"})
    empty = dict.fromkeys(ROW_SCHEMA.names)
    return [{**empty, **row} for row in clips]


def test_rays_own_schema_takes_the_settings_and_plans_the_gpus(captioner: CaptionConfig) -> None:
    from ray.data.llm import vLLMEngineProcessorConfig

    from data_prep.captions.vllm import vllm_settings

    settings = vllm_settings(captioner, engines=3, seed=7)
    known = vLLMEngineProcessorConfig.model_fields
    assert set(settings) <= set(known)
    accepted = vLLMEngineProcessorConfig(**settings)
    assert accepted.concurrency == 3
    assert accepted.engine_kwargs["tensor_parallel_size"] == 2
    assert accepted.engine_kwargs["limit_mm_per_prompt"] == {"image": 3}
    assert accepted.runtime_env == {"env_vars": {"VLLM_BATCH_INVARIANT": "1"}}
    assert vllm_gpus(captioner) == 2


def test_the_engine_is_asked_greedily_with_the_chat_and_the_frames(
    captioner: CaptionConfig,
) -> None:
    prompts = {1: "one", 2: "two", 3: "three"}
    clip, *_ = rows()
    asked = engine_row(clip, captioner, prompts, seed=7)
    assert asked["prompt"] == "three"
    assert asked["sampling_params"] == {"temperature": 0.0, "max_tokens": 12, "seed": 7}
    assert [image.size for image in asked["multimodal_data"]["image"]] == [(32, 32)] * 3
    assert engine_row(rows()[4], captioner, prompts, seed=7)["prompt"] == "one"


@pytest.mark.slow
def test_rows_go_through_rays_processor_whole_and_only_open_ones_reach_the_engine(
    cluster: None, captioner: CaptionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PrepareConfig(captioner=captioner)
    real = captions_on_ray.vllm_processor

    def without_gpu(config: PrepareConfig, *, engines: int) -> Any:
        from ray.llm._internal.batch.stages.base import StatefulStage, StatefulStageUDF

        class Engine(StatefulStageUDF):
            async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
                for row in batch[::-1]:
                    images = row["multimodal_data"]["image"]
                    level = int(np.asarray(images[0])[0, 0, 0])
                    answer = {
                        "generated_text": f"{row['prompt']} {len(images)} of {level}\n",
                        "__inference_error__": "RuntimeError: no" if row["number"] == 2 else "",
                        "__idx_in_batch": row["__idx_in_batch"],
                    }
                    yield answer

        processor = real(config, engines=engines)
        (stage,) = processor.stages.values()
        assert stage.map_batches_kwargs["ray_remote_args_fn"] is not None  # two GPUs an engine
        stand_in = StatefulStage(fn=Engine, map_batches_kwargs={"concurrency": 1, "num_cpus": 0.2})
        processor.stages = {"engine": stand_in}
        return processor

    monkeypatch.setattr(captions_on_ray, "vllm_processor", without_gpu)
    inputs = rows()
    blocks = [
        pa.Table.from_pylist(inputs[a:b], schema=ROW_SCHEMA) for a, b in ((0, 3), (3, 4), (4, 7))
    ]
    dataset = captions_on_ray.caption_with_vllm(ray.data.from_arrow(blocks), config, engines=1)
    outputs = {row["number"]: row for row in dataset.take_all()}
    assert len(outputs) == len(inputs)
    for row in inputs:
        out = outputs[row["number"]]
        captions = ("synthetic", "captioner", "caption_error")
        assert {k: v for k, v in out.items() if k not in captions} == {
            k: v for k, v in row.items() if k not in captions
        }
    assert "What?" in outputs[0]["synthetic"]
    assert outputs[1]["synthetic"].endswith("3 of 1")
    assert "Which?" in outputs[4]["synthetic"]
    assert outputs[4]["synthetic"].endswith("1 of 4")
    assert outputs[2]["caption_error"] == "engine_error: RuntimeError: no"
    assert outputs[2]["synthetic"] == ""
    assert outputs[3]["captioner"] is None
    assert outputs[-1]["captioner"] is None
    assert outputs[0]["captioner"].startswith("vllm:")


def test_without_vllm_or_a_gpu_it_says_what_is_missing(
    cluster: None, captioner: CaptionConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    config = PrepareConfig(captioner=captioner)
    with pytest.raises(CaptionerUnavailable, match=r"pip install 'flowreel\[vllm\]'"):
        prepare(config, world, tmp_path, codec_dir)
    wanted = needed_concurrency(config.concurrency, vllm_gpus=vllm_gpus(captioner), encodes=False)
    assert wanted.captioner_gpus == 2
    with pytest.raises(ResourceError, match="need 2 GPUS and 0 are free"):
        plan_resources(2.0, 0.0, wanted)


def test_captioners_and_encoders_share_the_gpus() -> None:
    wanted = ConcurrencyConfig(captioner_gpus=2.0, captioners=2, encoder_gpus=1.0)
    plan = plan_resources(64.0, 8.0, wanted)
    assert (plan["caption"].workers, plan["caption"].gpus) == (2, 2.0)
    assert (plan["encode"].workers, plan["encode"].gpus) == (4, 1.0)
    with pytest.raises(ResourceError, match="GPUS"):
        plan_resources(64.0, 3.0, wanted)
