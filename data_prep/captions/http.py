"""Captions by any OpenAI-compatible chat endpoint: one request a clip, frames as JPEG data-URLs.

A failure that may pass (no connection, a time-out, status 408, 409, 425, 429 or 5xx, an answer that
is no JSON) is tried again until the caption's deadline, after growing pauses or the endpoint's own
Retry-After. A failure that is the clip's own fault is recorded for it. A refused key or an unknown
model stops the run. The key is read from the environment and written nowhere. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import httpx
from PIL import Image

from data_prep.captions.captioner import (
    CaptionerUnavailable,
    CaptionResult,
    captioner_name,
    question,
    shown_images,
)
from data_prep.captions.config import CaptionConfig
from media.frames import Frames

_MAX_PAUSE_S = 60.0
_JPEG_QUALITY = 92
_PASSING_STATUSES = frozenset((408, 409, 425, 429))
_UNUSABLE_STATUSES = frozenset((401, 403, 404, 405))


class _RequestError(Exception):
    """A request that brought no caption.

    Args:
        code: short name of the failure.
        detail: what happened.
        again: whether another request may bring one.
        pause_s: the pause before it that the endpoint asks for, in seconds.
    """

    def __init__(self, code: str, detail: str, *, again: bool, pause_s: float | None = None):
        super().__init__(detail)
        self.code, self.again, self.pause_s = code, again, pause_s


class HttpCaptioner:
    """An endpoint, asked about several clips at a time.

    Args:
        config: the settings.
        seed: sent with every request, for endpoints that take one.

    Raises:
        CaptionerUnavailable: the environment variable named by `api_key_env` is not set.
    """

    def __init__(self, config: CaptionConfig, *, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.name = captioner_name(config)
        self._key = ""
        if config.api_key_env:
            self._key = os.environ.get(config.api_key_env, "").strip()
            if not self._key:
                raise CaptionerUnavailable(
                    f"environment variable {config.api_key_env} (captioner.api_key_env) is not set "
                    "where the captioning actors run; set it before Ray starts"
                )
        self._loop = asyncio.Runner()
        # No compression, so that a small answer cannot unfold into a large one.
        headers = {"accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=None,  # our own deadlines hold for the whole exchange, not for each read
            limits=httpx.Limits(max_connections=config.requests_in_flight),
        )

    def caption_all(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        """A caption or its failure for every clip, `requests_in_flight` at a time."""
        return self._loop.run(self._caption_all(clips))

    def close(self) -> None:
        """Close the connections."""
        self._loop.run(self._client.aclose())
        self._loop.close()

    async def _caption_all(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        free = asyncio.Semaphore(self.config.requests_in_flight)

        async def one(frames: Frames) -> CaptionResult:
            async with free:
                return await self._caption(frames)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(frames)) for frames in clips]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _caption(self, frames: Frames) -> CaptionResult:
        """One clip, with its retries, inside its deadline."""
        body = json.dumps(self._body(frames)).encode()
        last = _RequestError("timeout", f"no answer in {self.config.deadline_s:g} s", again=True)
        try:
            async with asyncio.timeout(self.config.deadline_s):
                for attempt in range(self.config.retries + 1):
                    try:
                        return await self._ask(body)
                    except _RequestError as failure:
                        last = failure
                        if not failure.again:
                            break
                    if attempt < self.config.retries:
                        pause_s = self.config.backoff_s * 2**attempt
                        await asyncio.sleep(min(last.pause_s or pause_s, _MAX_PAUSE_S))
        except TimeoutError:
            pass
        return CaptionResult.failed(last.code, str(last))

    async def _ask(self, body: bytes) -> CaptionResult:
        """One request. Raises _RequestError, or CaptionerUnavailable if none can succeed."""
        url = f"{(self.config.endpoint or '').rstrip('/')}/chat/completions"
        try:
            async with (
                asyncio.timeout(self.config.request_timeout_s),
                self._client.stream(
                    "POST", url, content=body, headers={"content-type": "application/json"}
                ) as response,
            ):
                data = await self._read(response)
        except TimeoutError as error:
            detail = f"no answer in {self.config.request_timeout_s:g} s"
            raise _RequestError("timeout", detail, again=True) from error
        except httpx.HTTPError as error:
            raise _RequestError("no_connection", type(error).__name__, again=True) from error
        if response.status_code != 200:
            self._refused(response, data)
        return _caption_in(data)

    async def _read(self, response: httpx.Response) -> bytes:
        data = b""
        async for chunk in response.aiter_raw(1 << 16):
            data += chunk
            if len(data) > self.config.max_response_bytes:
                detail = f"over {self.config.max_response_bytes} bytes"
                raise _RequestError("response_too_large", detail, again=False)
        return data

    def _refused(self, response: httpx.Response, data: bytes) -> None:
        status = response.status_code
        answer = " ".join(data[:200].decode("utf-8", "replace").split())
        if self._key:
            # An endpoint may repeat what it was sent, and the answer goes into messages and files.
            answer = answer.replace(self._key, "***")
        if status in _UNUSABLE_STATUSES:
            raise CaptionerUnavailable(
                f"{self.config.endpoint} answered {status} ({answer}); check captioner.endpoint, "
                "captioner.model and the key named by captioner.api_key_env, then run again"
            )
        if status in _PASSING_STATUSES or status >= 500:
            raise _RequestError(
                "endpoint_error", f"status {status}", again=True, pause_s=_retry_after_s(response)
            )
        raise _RequestError("endpoint_refused", f"status {status}: {answer}", again=False)

    def _body(self, frames: Frames) -> dict[str, Any]:
        images = [
            {"type": "image_url", "image_url": {"url": data_url(image)}}
            for image in shown_images(frames, self.config.frames)
        ]
        content = [*images, {"type": "text", "text": question(self.config, len(frames))}]
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
            "seed": self.seed,
        }


def data_url(image: Image.Image) -> str:
    """A picture as a JPEG data-URL.

    >>> data_url(Image.new("RGB", (8, 8)))[:23]
    'data:image/jpeg;base64,'
    """
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _caption_in(data: bytes) -> CaptionResult:
    """The caption of a chat completion. Raises _RequestError where there is none."""
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        detail = "the answer is no chat completion"
        raise _RequestError("bad_response", detail, again=True) from error
    if content is not None and not isinstance(content, str):
        raise _RequestError("bad_response", "the answer's content is no text", again=True)
    return CaptionResult.of(content or "")


def _retry_after_s(response: httpx.Response) -> float | None:
    """The pause that the endpoint asks for, in seconds; dates and nonsense are passed over."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdigit() and len(text) < 7 else None
