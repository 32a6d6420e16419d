"""More than one replica of each deployment: a session stays where its stream was routed to."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray

from serving.config import Limits, Resources, ServiceSpec
from serving.loading import LoadedModel
from serving.on_ray import serve_model
from serving.requests import Generation
from serving.session import generate


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_two_replicas_of_each_deployment_share_the_work_and_keep_sessions_whole(
    model_dir: Path, tmp_path: Path, loaded: LoadedModel
) -> None:
    resources = Resources(
        api_cpus=0.1, deep_cpus=0.3, decoder_cpus=0.3, deep_replicas=2, decoder_replicas=2
    )
    limits = Limits(concurrent=4, default_guidance=1.0)
    service = ServiceSpec(model_dir, data_dir=tmp_path, port=0, limits=limits, resources=resources)
    with (
        serve_model(service) as app,
        httpx.Client(base_url=app.url, timeout=30) as http,
    ):
        fields = {"prompt": "a red square", "num_frames": 81, "schedule": "sequential"}
        videos = [http.post("/v1/videos", json={**fields, "seed": n}).json() for n in range(4)]
        pids: dict[str, set[int]] = {"deep": set(), "decode": set()}
        for seed, video in enumerate(videos):
            while video["status"] in ("queued", "in_progress"):
                time.sleep(0.02)
                video = http.get(f"/v1/videos/{video['id']}").json()
            assert video["status"] == "completed", video
            spans = http.get(f"/v1/videos/{video['id']}/timeline").json()["spans"]
            for name, seen in pids.items():
                here = {span["pid"] for span in spans if span["name"] == name}
                assert len(here) == 1
                seen |= here
            answer = http.get(f"/v1/videos/{video['id']}/frames")
            request = Generation(request_id="x", guidance=1.0, **{**fields, "seed": seed})
            np.testing.assert_array_equal(
                np.load(io.BytesIO(answer.content)), generate(loaded, request).frames
            )
        assert {name: len(seen) for name, seen in pids.items()} == {"deep": 2, "decode": 2}
