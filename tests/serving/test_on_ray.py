"""The service as users meet it: real Ray Serve, real processes, real HTTP on loopback."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import ray

from media.write import encode_png
from serving.config import Limits, Resources, ServiceSpec
from serving.loading import LoadedModel
from serving.on_ray import ServedApp, serve_model
from serving.requests import Generation
from serving.session import generate
from serving.start import ServeStartError, process_runs, wait_ready
from tests.serving.conftest import FPS, TRAINED_FRAMES

LIMITS = Limits(
    prompt_chars=4096,
    max_frames=161,
    upload_bytes=200_000,
    queue_size=3,
    concurrent=2,
    default_guidance=1.0,
)


@dataclass
class Client:
    """The few calls that the tests make."""

    http: httpx.Client

    def create(self, **fields: object) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", json={"prompt": "a red square", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def finished(self, video: dict[str, Any]) -> dict[str, Any]:
        give_up_s = time.monotonic() + 60
        while time.monotonic() < give_up_s:
            now = self.http.get(f"/v1/videos/{video['id']}").json()
            if now["status"] not in ("queued", "in_progress"):
                assert now["status"] == "completed", now
                return now
            time.sleep(0.02)
        raise AssertionError(f"not finished: {now}")

    def frames(self, video: dict[str, Any]) -> np.ndarray:
        answer = self.http.get(f"/v1/videos/{video['id']}/frames")
        return np.load(io.BytesIO(answer.content), allow_pickle=False)

    def spans(self, video: dict[str, Any]) -> list[dict[str, Any]]:
        return self.http.get(f"/v1/videos/{video['id']}/timeline").json()["spans"]

    def idle(self) -> None:
        """Wait until nothing is queued or running, so that tests do not meet each other's work."""
        for video in self.http.get("/v1/videos?limit=100").json()["data"]:
            if video["status"] in ("queued", "in_progress"):
                self.finished(video)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=200 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def served(
    cluster: None, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedApp]:
    app = serve_model(
        ServiceSpec(
            model_dir,
            data_dir=tmp_path_factory.mktemp("served"),
            port=0,
            limits=LIMITS,
            resources=Resources(credit_frames=2),
        )
    )
    yield app
    app.stop()
    assert not [name for name, pid in app.local_pids.items() if process_runs(pid)]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{app.url}/health")


@pytest.fixture
def client(served: ServedApp) -> Iterator[Client]:
    with httpx.Client(base_url=served.url, timeout=30) as http:
        client = Client(http)
        yield client
        client.idle()


def test_text_becomes_a_video_equal_to_the_one_made_in_one_process(
    client: Client, loaded: LoadedModel
) -> None:
    video = client.finished(client.create(seed=11, guidance=2.0))
    request = Generation(
        request_id="x", prompt="a red square", num_frames=TRAINED_FRAMES, guidance=2.0, seed=11
    )
    np.testing.assert_array_equal(client.frames(video), generate(loaded, request).frames)
    mp4 = client.http.get(f"/v1/videos/{video['id']}/content")
    assert mp4.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(mp4.content)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (TRAINED_FRAMES, FPS)


def test_a_given_image_opens_the_video(
    client: Client, loaded: LoadedModel, picture: np.ndarray
) -> None:
    answer = client.http.post(
        "/v1/videos",
        data={"prompt": "a red square", "seed": "4"},
        files={"input_reference": ("first.png", encode_png(picture), "image/png")},
    )
    video = client.finished(answer.json())
    request = Generation(
        request_id="x",
        prompt="a red square",
        num_frames=TRAINED_FRAMES,
        guidance=1.0,
        seed=4,
        given_first_frame=True,
    )
    expected = generate(loaded, request, picture).frames
    np.testing.assert_array_equal(client.frames(video), expected)
    without = request.model_copy(update={"given_first_frame": False})
    assert (expected[0] != generate(loaded, without).frames[0]).any()


def test_a_long_video_runs_through_both_deployments_at_once(
    client: Client, loaded: LoadedModel, served: ServedApp
) -> None:
    num_frames = 81
    video = client.finished(client.create(num_frames=num_frames, seed=2, schedule="sequential"))
    request = Generation(
        request_id="x",
        prompt="a red square",
        num_frames=num_frames,
        guidance=1.0,
        seed=2,
        schedule="sequential",
    )
    np.testing.assert_array_equal(client.frames(video), generate(loaded, request).frames)
    spans = client.spans(video)
    deep = [span for span in spans if span["name"] == "deep"]
    decode = [span for span in spans if span["name"] == "decode"]
    assert {span["pid"] for span in deep} == {served.local_pids["deep"]}
    assert {span["pid"] for span in decode} == {served.local_pids["decode"]}
    assert {span["request_id"] for span in spans} == {video["id"]}
    overlapping = [
        (later["frame"], span["frame"])
        for span in decode
        for later in deep
        if later["frame"] > span["frame"]
        and later["start_s"] < span["end_s"]
        and span["start_s"] < later["end_s"]
    ]
    assert overlapping, spans


def test_the_deep_block_never_runs_further_ahead_than_its_credit(client: Client) -> None:
    spans = client.spans(client.finished(client.create(num_frames=81)))
    decoded_at = {span["frame"]: span["end_s"] for span in spans if span["name"] == "decode"}
    for span in spans:
        # Frame n may be begun once frame n - credit is decoded (1 ms: two processes, one clock).
        if span["name"] == "deep" and span["frame"] >= 2:
            assert span["start_s"] > decoded_at[span["frame"] - 2] - 1e-3, span


def test_requests_at_the_same_time_do_not_mix(client: Client, loaded: LoadedModel) -> None:
    prompts = ["a red square", "a blue circle", "a green triangle"]
    with ThreadPoolExecutor(3) as pool:
        videos = list(pool.map(lambda p: client.finished(client.create(prompt=p, seed=1)), prompts))
    for prompt, video in zip(prompts, videos, strict=True):
        request = Generation(
            request_id="x", prompt=prompt, num_frames=TRAINED_FRAMES, guidance=1.0, seed=1
        )
        np.testing.assert_array_equal(client.frames(video), generate(loaded, request).frames)


def test_a_video_outlives_the_death_of_its_deep_block(
    client: Client, loaded: LoadedModel, served: ServedApp
) -> None:
    video = client.create(num_frames=161, seed=6, schedule="sequential")
    while len(client.spans(video)) < 4:
        time.sleep(0.005)
    os.kill(served.local_pids["deep"], signal.SIGKILL)
    finished = client.finished(video)
    request = Generation(
        request_id="x",
        prompt="a red square",
        num_frames=161,
        guidance=1.0,
        seed=6,
        schedule="sequential",
    )
    got = client.frames(finished).astype(int)
    assert np.abs(got - generate(loaded, request).frames).max() <= 1
    deep_pids = {span["pid"] for span in client.spans(video) if span["name"] == "deep"}
    assert len(deep_pids) == 2
    served.local_pids = client.http.get("/health").json()["pids"]


@pytest.mark.slow
def test_an_api_that_dies_comes_back_and_says_what_was_lost(
    client: Client, served: ServedApp
) -> None:
    earlier = client.finished(client.create(num_frames=1))
    video = client.create(num_frames=161, schedule="sequential")
    while not client.spans(video):
        time.sleep(0.005)
    os.kill(served.local_pids["api"], signal.SIGKILL)
    served.local_pids = wait_ready(served.url, timeout_s=60)
    lost = client.http.get(f"/v1/videos/{video['id']}").json()
    assert (lost["status"], lost["error"]["code"]) == ("failed", "interrupted")
    assert len(client.frames(earlier)) == 1
    client.finished(client.create(num_frames=1))


def test_a_full_queue_answers_429_and_then_recovers(client: Client) -> None:
    answers = [
        client.http.post("/v1/videos", json={"prompt": "a", "num_frames": 81}) for _ in range(8)
    ]
    refusals = [answer for answer in answers if answer.status_code == 429]
    assert refusals
    assert int(refusals[0].headers["retry-after"]) >= 1
    assert refusals[0].json()["error"]["code"] == "queue_full"
    for answer in answers:
        if answer.status_code == 200:
            client.http.delete(f"/v1/videos/{answer.json()['id']}")
    client.finished(client.create(num_frames=1))


def test_a_cancelled_video_frees_both_deployments(client: Client) -> None:
    long = [client.create(num_frames=161, schedule="sequential") for _ in range(2)]
    for video in long:
        while not client.spans(video):
            time.sleep(0.01)
        client.http.post(f"/v1/videos/{video['id']}/cancel").raise_for_status()
    video = client.finished(client.create(num_frames=5))
    assert len(client.frames(video)) == 5


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": "x" * 4097}, "at most 4096"),
        ({"prompt": "a", "num_frames": 10}, "nearest allowed is 9"),
        ({"prompt": "a", "size": "64x64"}, "'32x32'"),
    ],
)
def test_a_bad_request_is_refused_in_openais_words(
    client: Client, fields: dict[str, object], told: str
) -> None:
    answer = client.http.post("/v1/videos", json=fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert told in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("size_bytes", "status"), [(300_000, 413), (1_000, 400)])
def test_an_upload_too_large_or_no_image_is_refused(
    client: Client, size_bytes: int, status: int
) -> None:
    files = {"input_reference": ("a.png", os.urandom(size_bytes), "image/png")}
    answer = client.http.post("/v1/videos", data={"prompt": "a"}, files=files)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_health_names_three_processes(client: Client, served: ServedApp) -> None:
    pids = client.http.get("/health").json()["pids"]
    assert pids == served.local_pids
    assert len(set(pids.values()) - {os.getpid()}) == 3


def test_a_second_service_in_the_same_cluster_is_refused(
    served: ServedApp, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ServeStartError, match="already runs in this Ray cluster"):
        serve_model(ServiceSpec(model_dir, data_dir=tmp_path, port=0))
