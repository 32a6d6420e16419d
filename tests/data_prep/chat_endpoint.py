"""A real OpenAI-style chat endpoint on loopback that fails the way it is told to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

Behaviour = Callable[["Endpoint", Request, dict[str, Any]], Any]


class Endpoint:
    """What it was asked, and how it answers: `behave` returns a response, or None for a caption."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times_s: list[float] = []
        self.most_at_once = 0
        self.behave: Behaviour = lambda endpoint, request, body: None
        self.delay_s = 0.0
        self.url = ""
        self._now = 0
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.answer)

    async def answer(self, request: Request) -> Response:
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            body = await request.json()
            self.requests.append(body)
            self.headers.append(dict(request.headers))
            self.times_s.append(time.monotonic())
            await asyncio.sleep(self.delay_s)
            answer = self.behave(self, request, body)
            if asyncio.iscoroutine(answer):
                answer = await answer
            return answer if answer is not None else completion(described(body))
        finally:
            self._now -= 1

    def tries(self, body: dict[str, Any]) -> int:
        """How often this very question was asked."""
        return sum(asked == body for asked in self.requests)


def completion(text: str | None) -> JSONResponse:
    return JSONResponse(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    )


def described(body: dict[str, Any]) -> str:
    """Words that depend on the pictures alone."""
    return f"Seen: {hashlib.sha256(b''.join(p.tobytes() for p in pictures(body))).hexdigest()[:8]}."


def pictures(body: dict[str, Any]) -> list[np.ndarray]:
    urls = [
        part["image_url"]["url"]
        for part in body["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    data = [base64.b64decode(url.partition(",")[2]) for url in urls]
    return [np.asarray(Image.open(io.BytesIO(d))) for d in data]


def endless() -> StreamingResponse:
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b" "
            await asyncio.sleep(0.02)

    return StreamingResponse(drip())


@contextmanager
def serving() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    config = uvicorn.Config(endpoint.app, host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    endpoint.url = f"http://127.0.0.1:{port}/v1"
    yield endpoint
    server.should_exit = True
    server.force_exit = True
    thread.join(10)
