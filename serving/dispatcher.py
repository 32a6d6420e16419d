"""Who is served when: a bounded queue, a fixed number of requests at one time, deadlines,
cancelling, results on disk.

Knows nothing of HTTP, and of the stages only the two methods of `Stages`; runs in one asyncio loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from media.errors import MediaError
from media.write import decode_image, encode_mp4
from serving.config import Limits
from serving.job_store import Job, JobStore
from serving.messages import Chunk, Frames, GeneratedVideo, Span, join
from serving.requests import (
    DeadlineExceeded,
    Generation,
    ModelFacts,
    QueueFull,
    ServingError,
    StageFailed,
)

log = logging.getLogger(__name__)

VIDEO_NAME = "video.mp4"
FRAMES_NAME = "frames.npy"
TIMELINE_NAME = "timeline.json"
REFERENCE_NAME = "reference"


class Stages(Protocol):
    """What makes videos: Ray Serve deployments, or sessions in this process."""

    def generate(
        self, request: Generation, image_HWC: Frames | None
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of the video in order; closing the iterator stops the work."""
        ...

    async def check_ready(self) -> dict[str, int]:
        """Process ids by stage; raises StagesNotReady unless every stage answers."""
        ...


class Dispatcher:
    """Takes requests in and sees each to its end. Start with `start`, end with `close`."""

    def __init__(self, stages: Stages, store: JobStore, facts: ModelFacts, limits: Limits) -> None:
        self._stages, self._store, self._facts, self._limits = stages, store, facts, limits
        self._waiting: deque[str] = deque()
        self._arrived = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._live_spans: dict[str, list[Span]] = {}
        self._durations_s: deque[float] = deque(maxlen=8)
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take up what a former process left queued, and begin."""
        for job in self._store.recover():
            self._waiting.append(job.id)
            self._arrived.set()
        self._loop_task = asyncio.create_task(self._dispatch())

    async def close(self) -> None:
        """Stop all work; what was in progress is failed by the next `start`."""
        tasks = list(self._running.values())
        if self._loop_task is not None:
            tasks.append(self._loop_task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def submit(self, request: Generation, reference: bytes | None) -> Job:
        """Queue a request; `reference` is the uploaded image file, already known to be readable.

        Raises:
            QueueFull: as many are waiting as may.
        """
        if len(self._waiting) >= self._limits.queue_size:
            raise QueueFull(
                f"{len(self._waiting)} videos are waiting, which is all that may; "
                "come back after the time in Retry-After.",
                retry_after_s=self._retry_after_s(),
            )
        job = self._store.create(
            request.request_id, self._facts.name, request.model_dump(mode="json")
        )
        if reference is not None:
            (job.folder / REFERENCE_NAME).write_bytes(reference)
        self._waiting.append(job.id)
        self._arrived.set()
        return job

    async def cancel(self, job_id: str) -> bool:
        """Stop an unfinished job; False where it had finished already."""
        cancelled = self._store.cancel(job_id)
        if job_id in self._waiting:
            self._waiting.remove(job_id)
        task = self._running.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return cancelled

    def spans(self, job: Job) -> list[dict[str, object]]:
        """What has been measured of a job so far, or of the whole of it once it is finished."""
        live = self._live_spans.get(job.id)
        if live is not None:
            return [span.to_dict() for span in live]
        path = job.folder / TIMELINE_NAME
        return json.loads(path.read_text()) if path.is_file() else []

    def _retry_after_s(self) -> int:
        # A guess from the last few videos; before any has finished, a few seconds.
        typical_s = sum(self._durations_s) / len(self._durations_s) if self._durations_s else 5.0
        return max(1, math.ceil(typical_s / self._limits.concurrent))

    async def _dispatch(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting and len(self._running) < self._limits.concurrent:
                job_id = self._waiting.popleft()
                if not self._store.start(job_id):
                    continue
                task = asyncio.create_task(self._run(self._store.require(job_id)))
                self._running[job_id] = task
                task.add_done_callback(partial(self._ended, job_id))

    def _ended(self, job_id: str, _task: asyncio.Task[None]) -> None:
        del self._running[job_id]
        self._live_spans.pop(job_id, None)
        self._arrived.set()

    async def _run(self, job: Job) -> None:
        """One job from start to end; whatever happens, its row says so."""
        began_s = time.time()
        left_s = self._limits.deadline_s - (began_s - job.created_at)
        try:
            async with asyncio.timeout(left_s):
                video = await self._generate(job)
                await asyncio.to_thread(
                    write_results, job.folder, video, keep_frames=self._limits.keep_frames
                )
            self._store.complete(job.id)
            self._durations_s.append(time.time() - began_s)
        except TimeoutError:
            late = DeadlineExceeded(
                f"Not finished within {self._limits.deadline_s:g} s of being asked for; "
                "ask for fewer frames, or when fewer videos are waiting."
            )
            self._store.fail(job.id, late.code, late.message)
        except ServingError as error:
            self._store.fail(job.id, error.code, error.message)
        except (MediaError, OSError) as error:
            self._store.fail(job.id, "result_not_written", str(error))
        except Exception as error:
            # A fault of ours must end this job, not the dispatcher; the row and the log both tell
            # of it.
            log.exception("job %s", job.id)
            self._store.fail(job.id, StageFailed.code, f"{type(error).__name__}: {error}")

    async def _generate(self, job: Job) -> GeneratedVideo:
        request = Generation.model_validate(job.request)
        image_HWC = None
        if request.given_first_frame:
            data = await asyncio.to_thread((job.folder / REFERENCE_NAME).read_bytes)
            image_HWC = await asyncio.to_thread(
                decode_image, data, max_pixels=self._limits.image_pixels
            )
        chunks: list[Chunk] = []
        live = self._live_spans[job.id] = []
        done = 0
        stream = self._stages.generate(request, image_HWC)
        async with aclosing(stream):
            async for chunk in stream:
                chunks.append(chunk)
                live.extend(chunk.spans)
                done += len(chunk.frames)
                self._store.progress(job.id, min(99.0, 100.0 * done / request.num_frames))
        if done != request.num_frames:
            raise StageFailed(f"The stages ended after {done} of {request.num_frames} frames.")
        return join(chunks, self._facts.fps)


def write_results(folder: Path, video: GeneratedVideo, *, keep_frames: bool) -> None:
    """mp4, lossless frames and timeline, each complete or not there."""
    spans = json.dumps([span.to_dict() for span in video.spans])
    _write_whole(folder / TIMELINE_NAME, spans.encode())
    if keep_frames:
        partial = folder / f"{FRAMES_NAME}.partial"
        with partial.open("wb") as file:
            np.save(file, video.frames, allow_pickle=False)
        partial.rename(folder / FRAMES_NAME)
    _write_whole(folder / VIDEO_NAME, encode_mp4(video.frames, video.fps))


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.rename(path)
