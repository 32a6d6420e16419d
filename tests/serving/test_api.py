"""The HTTP dialect and the dispatcher over real sessions in this process; no cluster, no socket."""

from __future__ import annotations

import asyncio
import errno
import io
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute

import serving.api
import serving.dispatcher
from media.write import encode_png
from serving.api import create_app
from serving.config import Limits
from serving.errors import ReplicaFailed
from serving.job_store import JobStore
from serving.loading import LoadedModel
from serving.requests import Generation
from serving.session import generate
from tests.serving.in_process import LocalVideoMaker

LIMITS = Limits(
    prompt_chars=50,
    max_frames=33,
    upload_bytes=20_000,
    queue_size=2,
    concurrent=1,
    default_guidance=1.0,
)


@dataclass
class Service:
    client: httpx.AsyncClient
    maker: LocalVideoMaker

    async def create(self, **fields: object) -> dict[str, Any]:
        answer = await self.client.post("/v1/videos", json={"prompt": "a red square", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def until(self, video_id: str, *wanted: str) -> dict[str, Any]:
        for _ in range(1000):
            video = (await self.client.get(f"/v1/videos/{video_id}")).json()
            if video["status"] in wanted:
                return video
            await asyncio.sleep(0.01)
        raise AssertionError(f"still {video}")


@asynccontextmanager
async def running_service(
    loaded: LoadedModel, data_dir: Path, limits: Limits = LIMITS
) -> AsyncIterator[Service]:
    maker = LocalVideoMaker(loaded)
    app = create_app(maker, JobStore(data_dir), loaded.facts, limits)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield Service(client, maker)


@pytest.fixture
def run(loaded: LoadedModel, tmp_path: Path) -> Callable[..., None]:
    """Runs a test's body against a fresh service."""

    def runner(body: Callable[[Service], Awaitable[None]], **changes: object) -> None:
        async def main() -> None:
            limits = LIMITS.model_copy(update=changes)
            async with running_service(loaded, tmp_path, limits) as service:
                await body(service)

        asyncio.run(main())

    return runner


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refusal in OpenAI's body."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_video_is_made_as_the_sessions_make_it(
    run: Callable[..., None], loaded: LoadedModel
) -> None:
    async def body(service: Service) -> None:
        video = await service.create(seed=7, seconds="1", size="32x32", model="tiny")
        assert (video["object"], video["status"], video["seconds"]) == ("video", "queued", "1")
        video = await service.until(video["id"], "completed", "failed")
        assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
        frames = await service.client.get(f"/v1/videos/{video['id']}/frames")
        got = np.load(io.BytesIO(frames.content), allow_pickle=False)
        request = Generation(
            request_id="x", prompt="a red square", num_frames=9, guidance=1, seed=7
        )
        np.testing.assert_array_equal(got, generate(loaded, request).frames)
        content = await service.client.get(f"/v1/videos/{video['id']}/content")
        assert content.headers["content-type"] == "video/mp4"
        assert content.content[4:8] == b"ftyp"

    run(body)


def test_form_fields_and_an_image_are_understood(
    run: Callable[..., None], picture: np.ndarray
) -> None:
    async def body(service: Service) -> None:
        answer = await service.client.post(
            "/v1/videos",
            data={"prompt": "a red square", "num_frames": "5", "guidance": "0.5"},
            files={"input_reference": ("a.png", encode_png(picture), "image/png")},
        )
        video = answer.json()
        assert (video["num_frames"], video["guidance"]) == (5, 0.5)
        assert (await service.until(video["id"], "completed", "failed"))["status"] == "completed"

    run(body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 51}, "prompt"),
        ({"prompt": "a", "num_frames": 8}, "num_frames"),
        ({"prompt": "a", "size": "1280x720"}, "size"),
        ({"prompt": "a", "seconds": "twelve"}, "seconds"),
        ({"prompt": "a", "schedule": "random"}, "schedule"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "steps": 4}, "steps"),
    ],
)
def test_a_wrong_field_is_refused_by_name(
    run: Callable[..., None], fields: dict[str, object], param: str
) -> None:
    async def body(service: Service) -> None:
        error = refusal(await service.client.post("/v1/videos", json=fields), 400)
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert error["message"]

    run(body)


def test_a_body_that_is_no_request_is_refused(run: Callable[..., None]) -> None:
    async def body(service: Service) -> None:
        post = service.client.post
        refusal(
            await post("/v1/videos", content=b"{", headers={"content-type": "application/json"}),
            400,
        )
        refusal(await post("/v1/videos", content=b"hello"), 400)
        refusal(
            await post("/v1/videos", content=b"x", headers={"content-type": "multipart/form-data"}),
            400,
        )
        no_image = {"input_reference": ("a.png", b"not an image", "image/png")}
        error = refusal(await post("/v1/videos", data={"prompt": "a"}, files=no_image), 400)
        assert error["param"] == "input_reference"
        elsewhere = {"picture": ("a.png", b"x", "image/png")}
        error = refusal(await post("/v1/videos", data={"prompt": "a"}, files=elsewhere), 400)
        assert error["param"] == "picture"

    run(body)


def test_an_upload_over_the_cap_is_refused_declared_or_not(run: Callable[..., None]) -> None:
    async def undeclared() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    async def body(service: Service) -> None:
        files = {"input_reference": ("a.png", b"x" * 30_000, "image/png")}
        error = refusal(
            await service.client.post("/v1/videos", data={"prompt": "a"}, files=files), 413
        )
        assert "20000 bytes" in error["message"]
        json_type = {"content-type": "application/json"}
        refusal(
            await service.client.post("/v1/videos", content=undeclared(), headers=json_type), 413
        )

    run(body)


def test_unknown_routes_videos_and_methods_have_openais_body(run: Callable[..., None]) -> None:
    async def body(service: Service) -> None:
        client = service.client
        refusal(await client.get("/v1/nothing"), 404)
        refusal(await client.put("/v1/videos"), 405)
        refusal(await client.get("/v1/videos?limit=0"), 400)
        for path in ("", "/content", "/frames", "/timeline"):
            assert refusal(await client.get(f"/v1/videos/none{path}"), 404)["code"] == "not_found"
        refusal(await client.delete("/v1/videos/none"), 404)

    run(body)


def test_a_full_queue_says_when_to_come_back(run: Callable[..., None]) -> None:
    async def body(service: Service) -> None:
        service.maker.gate.clear()
        first = await service.create()
        await service.until(first["id"], "in_progress")
        waiting = [await service.create(num_frames=1) for _ in range(2)]
        answer = await service.client.post("/v1/videos", json={"prompt": "a"})
        assert refusal(answer, 429)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        service.maker.gate.set()
        for video in waiting:
            await service.until(video["id"], "completed")
        await service.create(num_frames=1)

    run(body)


def test_results_are_refused_until_they_are_there(run: Callable[..., None]) -> None:
    async def body(service: Service) -> None:
        service.maker.gate.clear()
        video = await service.create(num_frames=1)
        error = refusal(await service.client.get(f"/v1/videos/{video['id']}/content"), 409)
        assert error["code"] == "video_not_ready"
        service.maker.gate.set()
        await service.until(video["id"], "completed")
        wrong = await service.client.get(f"/v1/videos/{video['id']}/content?variant=spritesheet")
        assert refusal(wrong, 400)["param"] == "variant"

    run(body)


def test_cancelling_stops_the_work_and_lets_the_next_one_in(run: Callable[..., None]) -> None:
    async def body(service: Service) -> None:
        service.maker.gate.clear()
        running, waiting = await service.create(), await service.create()
        await service.until(running["id"], "in_progress")
        for video in (waiting, running):
            cancelled = await service.client.post(f"/v1/videos/{video['id']}/cancel")
            assert cancelled.json()["status"] == "cancelled"
        assert service.maker.closed == [running["id"]]
        refusal(await service.client.post(f"/v1/videos/{running['id']}/cancel"), 409)
        service.maker.gate.set()
        await service.until((await service.create(num_frames=1))["id"], "completed")

    run(body)


def test_a_deleted_video_is_gone_and_its_work_stopped(
    run: Callable[..., None], tmp_path: Path
) -> None:
    async def body(service: Service) -> None:
        service.maker.gate.clear()
        video = await service.create()
        await service.until(video["id"], "in_progress")
        answer = await service.client.delete(f"/v1/videos/{video['id']}")
        assert answer.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
        refusal(await service.client.get(f"/v1/videos/{video['id']}"), 404)
        assert service.maker.closed == [video["id"]]
        assert list((tmp_path / "videos").iterdir()) == []

    run(body)


def test_a_video_deleted_while_its_files_are_written_leaves_none(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write = serving.dispatcher.write_results

    def write_slowly(folder: Path, *args: Any, **options: Any) -> None:
        begun.set()
        go_on.wait(10)
        write(folder, *args, **options)

    monkeypatch.setattr(serving.dispatcher, "write_results", write_slowly)

    async def body(service: Service) -> None:
        video = await service.create(num_frames=1)
        await asyncio.to_thread(begun.wait, 10)
        deletion = asyncio.create_task(service.client.delete(f"/v1/videos/{video['id']}"))
        await asyncio.sleep(0.05)
        assert not deletion.done()
        go_on.set()
        assert (await deletion).json()["deleted"]
        assert list((tmp_path / "videos").iterdir()) == []

    run(body)


def test_a_result_that_cannot_be_written_fails_its_video(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(serving.dispatcher, "write_results", disk_is_full)

    async def body(service: Service) -> None:
        failed = await service.until((await service.create(num_frames=1))["id"], "failed")
        assert failed["error"]["code"] == "result_not_written"
        assert "No space left" in failed["error"]["message"]

    run(body)


def test_a_video_that_misses_its_deadline_fails(run: Callable[..., None]) -> None:
    async def body(service: Service) -> None:
        service.maker.gate.clear()
        failed = await service.until((await service.create())["id"], "failed")
        assert failed["error"]["code"] == "deadline_exceeded"
        assert "0.2 s" in failed["error"]["message"]

    run(body, deadline_s=0.2)


@pytest.mark.parametrize("fault", [ReplicaFailed("the deep block died"), RuntimeError("a bug")])
def test_a_failing_replica_fails_its_video_and_no_other(
    run: Callable[..., None], fault: Exception
) -> None:
    async def body(service: Service) -> None:
        service.maker.fault = fault
        failed = await service.until((await service.create())["id"], "failed")
        assert failed["error"]["code"] == "stage_failed"
        assert str(fault) in failed["error"]["message"]
        service.maker.fault = None
        await service.until((await service.create(num_frames=1))["id"], "completed")

    run(body)


def test_lists_models_and_health_answer(run: Callable[..., None]) -> None:
    async def body(service: Service) -> None:
        ids = [(await service.create(num_frames=1))["id"] for _ in range(2)]
        page = (await service.client.get("/v1/videos?limit=1")).json()
        assert ([v["id"] for v in page["data"]], page["has_more"]) == (ids[1:], True)
        rest = (await service.client.get(f"/v1/videos?after={page['last_id']}")).json()
        assert [v["id"] for v in rest["data"]] == ids[:1]
        models = (await service.client.get("/v1/models")).json()
        assert (models["data"][0]["id"], models["data"][0]["size"]) == ("tiny", "32x32")
        assert (await service.client.get("/health")).json()["status"] == "ready"
        service.maker.ready = False
        refusal(await service.client.get("/health"), 503)

    run(body)


def test_the_table_of_routes_is_the_apps_own(loaded: LoadedModel, tmp_path: Path) -> None:
    table = re.findall(r"^    ([A-Z]+) +(/\S+) {2,}\S", serving.api.__doc__ or "", re.MULTILINE)
    store = JobStore(tmp_path)
    app = create_app(LocalVideoMaker(loaded), store, loaded.facts, LIMITS)
    store.close()
    ours = {
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert len(table) == len(set(table))
    assert set(table) == ours


def test_a_restart_fails_what_ran_and_makes_what_waited(
    loaded: LoadedModel, tmp_path: Path, picture: np.ndarray
) -> None:
    async def main() -> None:
        async with running_service(loaded, tmp_path) as service:
            service.maker.gate.clear()
            running = await service.create()
            await service.until(running["id"], "in_progress")
            answer = await service.client.post(
                "/v1/videos",
                data={"prompt": "a", "num_frames": "1"},
                files={"input_reference": ("a.png", encode_png(picture), "image/png")},
            )
            waiting = answer.json()
        async with running_service(loaded, tmp_path) as service:
            failed = await service.until(running["id"], "failed")
            assert failed["error"]["code"] == "interrupted"
            assert (await service.until(waiting["id"], "completed"))["seed"] == waiting["seed"]

    asyncio.run(main())
