"""Stages in this process, for tests of the Api without a cluster: the real sessions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator

from serving.requests import Generation, StagesNotReady
from serving.session import (
    Chunk,
    DecoderSession,
    DeepSession,
    Frames,
    LoadedModel,
    encode_first_frame,
)


class LocalStages:
    """`serving.dispatcher.Stages` over one loaded model; `gate` holds every video at its start."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.gate = asyncio.Event()
        self.gate.set()
        self.ready = True
        self.fault: Exception | None = None
        self.closed: list[str] = []

    async def generate(
        self, request: Generation, image_HWC: Frames | None
    ) -> AsyncGenerator[Chunk, None]:
        try:
            await self.gate.wait()
            if self.fault is not None:
                raise self.fault
            first_u = None
            if image_HWC is not None:
                first_u = encode_first_frame(self.loaded, request, image_HWC)
            deep = DeepSession(self.loaded, request, first_u)
            decoder = DecoderSession(self.loaded, request, deep.opening)
            for frame in deep:
                yield await asyncio.to_thread(decoder.push, frame)
            yield decoder.finish()
        finally:
            self.closed.append(request.request_id)

    async def check_ready(self) -> dict[str, int]:
        if not self.ready:
            raise StagesNotReady("not yet")
        return {"api": os.getpid()}
