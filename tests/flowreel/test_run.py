"""Shards to a served video from Python alone, on a real Ray; silent unless asked to print."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import ray

import flowreel
from data_prep.world.shards import write_world

SETTINGS = [
    "train.steps=2",
    "train.checkpoints.every_steps=2",
    "train.batches.batch_size=2",
    "train.batches.image_batch_size=2",
    "train.workers.strategy=single",
    "train.workers.count=1",
    "train.tracking.enabled=false",
    "model.deep_width=64",
    "model.shallow_width=32",
    "model.layers_per_block=[1,1,1,2]",
    "model.denoiser_layers=2",
]


@pytest.mark.slow
def test_shards_become_latents_a_model_and_a_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = flowreel.load_recipe("tiny", SETTINGS)
    write_world(tmp_path / "shards", 40, 8, clips_per_shard=24)

    report = flowreel.prepare(recipe, str(tmp_path / "shards"), tmp_path / "latents")
    assert report.counts == {"kept": 48}
    assert len(flowreel.LatentDataset(tmp_path / "latents", split="all")) == 48
    again = flowreel.prepare(recipe, str(tmp_path / "shards"), tmp_path / "latents")
    assert again.samples_now == 0
    only = flowreel.prepare(recipe, None, tmp_path / "latents", only="captions")
    assert only.samples_now == 0

    result = flowreel.train(recipe, tmp_path / "latents", tmp_path / "run")
    assert result.steps == 2
    assert flowreel.train(recipe, tmp_path / "latents", tmp_path / "run").resumed_from == 2
    for folder in ("latents", "run"):
        saved = flowreel.load_recipe(str(tmp_path / folder / "recipe.yaml"))
        assert saved == recipe
    assert not capsys.readouterr().out, "only `verbose` prints"

    model = flowreel.load(result.model_dir, recipe=recipe)
    with flowreel.serve(model, recipe=recipe, data_dir=tmp_path / "served", port=0) as app:
        (entry,) = httpx.get(f"{app.url}/v1/models").json()["data"]
        assert entry["num_frames"] == model.video.num_frames == 17
    assert not ray.is_initialized()
    assert model.sample("a red circle").frames.dtype == np.uint8
