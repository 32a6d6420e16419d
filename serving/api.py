"""HTTP: the OpenAI Videos dialect over a `Dispatcher`. Knows nothing of Ray or tensors.

    POST   /v1/videos                      ask for one, in JSON or as a form with an image
    GET    /v1/videos                      those asked for, newest first; limit, after, order
    GET    /v1/videos/{video_id}           its status, progress and error
    GET    /v1/videos/{video_id}/content   the video as mp4
    GET    /v1/videos/{video_id}/frames    its lossless frames as npy, uint8 [T, H, W, 3]
    GET    /v1/videos/{video_id}/timeline  what ran where and when
    POST   /v1/videos/{video_id}/cancel    stop an unfinished video
    DELETE /v1/videos/{video_id}           forget it; an unfinished one is stopped first
    GET    /v1/models                      the one model that is served
    GET    /health                         200 only when every deployment answers

The form's file `input_reference` is the first frame of the video. The routes `frames`, `timeline`
and `cancel` are ours, the rest is OpenAI's. Every refusal has OpenAI's error body; its classes and
codes are in `serving.errors`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from media.errors import MediaError
from media.write import decode_image
from serving.config import Limits
from serving.dispatcher import FRAMES_NAME, VIDEO_NAME, Dispatcher, VideoMaker
from serving.errors import (
    InvalidRequest,
    NotFound,
    NotReady,
    ServingError,
    UploadTooLarge,
    error_body,
)
from serving.job_store import Job, JobStore
from serving.requests import CreateVideo, Generation, ModelFacts, from_validation


def create_app(maker: VideoMaker, store: JobStore, facts: ModelFacts, limits: Limits) -> FastAPI:
    """The service as an ASGI app.

    Its lifespan starts and ends the dispatcher, and closes the store.
    """
    dispatcher = Dispatcher(maker, store, facts, limits)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        dispatcher.start()
        yield
        await dispatcher.close()
        store.close()

    app = FastAPI(title="Flowreel", lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=limits.upload_bytes)
    _add_error_handlers(app)
    _add_video_routes(app, dispatcher, store, facts, limits)
    _add_result_routes(app, dispatcher, store)
    _add_service_routes(app, maker, facts)
    return app


class BodyLimit:
    """ASGI middleware that refuses a body over `max_bytes`.

    A declared length is believed at once; where none is declared, or a false one, bytes are counted
    as they come.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body under watch."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            # The handlers of errors sit inside of this middleware, so it answers by itself.
            refusal = self._refusal(f"{int(length)} bytes")
            await JSONResponse(refusal.body(), refusal.status)(scope, receive, send)
            return
        num_bytes = 0

        async def receive_and_count() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise self._refusal("more")
            return message

        await self.app(scope, receive_and_count, send)

    def _refusal(self, size: str) -> UploadTooLarge:
        return UploadTooLarge(
            f"The request body may have at most {self.max_bytes} bytes; this one has {size}."
        )


def _add_error_handlers(app: FastAPI) -> None:
    """Give OpenAI's error body to our errors, to those of FastAPI and of routing, and to faults."""

    def answer_refusal(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ServingError)
        wait = error.retry_after_s
        headers = None if wait is None else {"Retry-After": str(wait)}
        return JSONResponse(error.body(), error.status, headers)

    def answer_wrong_query(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return answer_refusal(request, InvalidRequest(f"{param}: {first['msg']}.", param=param))

    def answer_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        body = error_body(f"{where}: {error.detail}", "invalid_request_error", None, None)
        return JSONResponse(body, error.status_code, error.headers)

    def answer_fault(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, so that the server's log has the rest.
        message = f"The service failed ({type(error).__name__}); its log has the details."
        return answer_refusal(request, ServingError(message))

    app.add_exception_handler(ServingError, answer_refusal)
    app.add_exception_handler(RequestValidationError, answer_wrong_query)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_exception_handler(Exception, answer_fault)


def _add_video_routes(
    app: FastAPI, dispatcher: Dispatcher, store: JobStore, facts: ModelFacts, limits: Limits
) -> None:
    @app.post("/v1/videos")
    async def create_video(request: Request) -> dict[str, Any]:
        body, reference = await read_body(request, limits)
        generation = Generation.admit(
            body,
            facts,
            limits,
            request_id=f"video_{secrets.token_hex(12)}",
            seed=secrets.randbelow(1 << 32),
            given_first_frame=reference is not None,
        )
        return video_object(dispatcher.submit(generation, reference), facts)

    @app.get("/v1/videos")
    async def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        jobs, has_more = store.page(limit=limit, after=after, newest_first=order == "desc")
        return {
            "object": "list",
            "data": [video_object(job, facts) for job in jobs],
            "first_id": jobs[0].id if jobs else None,
            "last_id": jobs[-1].id if jobs else None,
            "has_more": has_more,
        }

    @app.get("/v1/videos/{video_id}")
    async def retrieve_video(video_id: str) -> dict[str, Any]:
        return video_object(find(store, video_id), facts)

    @app.post("/v1/videos/{video_id}/cancel")
    async def cancel_video(video_id: str) -> dict[str, Any]:
        job = find(store, video_id)
        if not await dispatcher.cancel(job.id):
            raise NotReady(f"Video {job.id} is {job.status} already; there is nothing to cancel.")
        return video_object(find(store, video_id), facts)

    @app.delete("/v1/videos/{video_id}")
    async def delete_video(video_id: str) -> dict[str, Any]:
        job = find(store, video_id)
        await dispatcher.cancel(job.id)
        await asyncio.to_thread(store.remove, job.id)
        return {"id": job.id, "object": "video.deleted", "deleted": True}


def _add_result_routes(app: FastAPI, dispatcher: Dispatcher, store: JobStore) -> None:
    @app.get("/v1/videos/{video_id}/content")
    async def content(video_id: str, variant: str = "video") -> FileResponse:
        if variant != "video":
            raise InvalidRequest(
                f"variant {variant!r} is not made here; allowed: 'video'.", param="variant"
            )
        path = finished_file(find(store, video_id), VIDEO_NAME)
        return FileResponse(path, media_type="video/mp4", filename=f"{video_id}.mp4")

    @app.get("/v1/videos/{video_id}/frames")
    async def frames(video_id: str) -> FileResponse:
        path = finished_file(find(store, video_id), FRAMES_NAME)
        return FileResponse(path, media_type="application/octet-stream", filename=f"{video_id}.npy")

    @app.get("/v1/videos/{video_id}/timeline")
    async def timeline(video_id: str) -> dict[str, Any]:
        job = find(store, video_id)
        return {"object": "video.timeline", "id": job.id, "spans": dispatcher.spans(job)}


def _add_service_routes(app: FastAPI, maker: VideoMaker, facts: ModelFacts) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {
            "id": facts.name,
            "object": "model",
            "created": 0,
            "owned_by": "flowreel",
            "size": facts.size,
            "fps": facts.fps,
            "num_frames": facts.num_frames,
            "seconds": seconds_text(facts.num_frames, facts.fps),
        }
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ready", "pids": await maker.check_ready()}


async def read_body(request: Request, limits: Limits) -> tuple[CreateVideo, bytes | None]:
    """The request body, JSON or multipart, and the uploaded image where there is one.

    Raises:
        InvalidRequest: it is neither, a field is wrong, or the upload is no image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Read by hand, not by FastAPI's parameters: the two kinds of body share one route and schema.
    try:
        if kind == "application/json":
            return CreateVideo.model_validate_json(await request.body()), None
        if kind == "multipart/form-data":
            return await _read_form(request, limits)
    except ValidationError as error:
        raise from_validation(error) from error
    raise InvalidRequest(
        f"Content-Type {kind!r} is not understood; "
        "send application/json, or multipart/form-data with an image."
    )


async def _read_form(request: Request, limits: Limits) -> tuple[CreateVideo, bytes | None]:
    async with request.form(max_files=1, max_fields=16, max_part_size=1 << 20) as form:
        fields: dict[str, Any] = dict(form)
        upload = fields.pop("input_reference", None)
        stray = [name for name, value in fields.items() if isinstance(value, UploadFile)]
        if stray or isinstance(upload, str):
            raise InvalidRequest(
                "An image is uploaded as a file in the field 'input_reference', and nowhere else.",
                param=stray[0] if stray else "input_reference",
            )
        body = CreateVideo.model_validate(fields)
        if upload is None:
            return body, None
        data = await upload.read()
    # Decoded here only to refuse at once what is no image; the queue keeps the file's bytes.
    try:
        await asyncio.to_thread(decode_image, data, max_pixels=limits.image_pixels)
    except MediaError as error:
        raise InvalidRequest(f"input_reference: {error}.", param="input_reference") from error
    return body, data


def find(store: JobStore, video_id: str) -> Job:
    """The job of a video id.

    Raises:
        NotFound: there is none.
    """
    job = store.get(video_id)
    if job is None:
        raise NotFound(f"No video {video_id!r}; it was never asked for, or has been deleted.")
    return job


def finished_file(job: Job, name: str) -> Path:
    """A result file of a completed job.

    Raises:
        NotReady: the job is not completed, or failed.
        NotFound: the job is completed, but the settings keep no such file.
    """
    if job.status != "completed":
        reason = f": {job.error_message}" if job.error_message else ""
        raise NotReady(f"Video {job.id} is {job.status}, not completed{reason}")
    path = job.folder / name
    if not path.is_file():
        raise NotFound(f"{name} of video {job.id} was not kept.")
    return path


def seconds_text(num_frames: int, fps: float) -> str:
    """Length as OpenAI writes it: a string of seconds.

    >>> seconds_text(81, 16.0)
    '5'
    """
    return f"{(num_frames - 1) / fps:g}"


def video_object(job: Job, facts: ModelFacts) -> dict[str, Any]:
    """OpenAI's video object, with our extra fields at the end."""
    has_failed = job.error_code is not None
    request = job.request
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": int(job.progress),
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None,
        "prompt": request["prompt"],
        "size": facts.size,
        "seconds": seconds_text(request["num_frames"], facts.fps),
        "remixed_from_video_id": None,
        "error": {"code": job.error_code, "message": job.error_message} if has_failed else None,
        "num_frames": request["num_frames"],
        "fps": facts.fps,
        "guidance": request["guidance"],
        "seed": request["seed"],
        "schedule": request["schedule"],
    }
