"""Videos made in this process by the real sessions, for tests of the Api without a cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator

from media.frames import Frames
from serving.errors import ReplicasNotReady
from serving.loading import LoadedModel
from serving.messages import Chunk
from serving.requests import Generation
from serving.session import DecoderSession, DeepSession, encode_first_frame


class LocalVideoMaker:
    """`serving.dispatcher.VideoMaker` over one model; `gate` holds every video at its start."""

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
            raise ReplicasNotReady("not yet")
        return {"api": os.getpid()}
