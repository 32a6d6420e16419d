"""Who is served when: a bounded queue, some requests at one time, deadlines, cancelling, results.

A request waits in the queue, is made by a `VideoMaker`, and leaves its files in its job's folder;
the job's row says at every moment how far it is. All of it runs in one asyncio loop. Knows nothing
of HTTP or Ray, and nothing of what makes videos but the two methods of `VideoMaker`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from flowreel.files import replacing, write_whole
from media.errors import MediaError
from media.frames import Frames
from media.write import decode_image, encode_mp4
from serving.config import Limits
from serving.errors import (
    DeadlineExceeded,
    QueueFull,
    ReplicaFailed,
    ResultNotWritten,
    ServingError,
)
from serving.job_store import Job, JobStore
from serving.messages import Chunk, GeneratedVideo, WorkSpan, join
from serving.requests import Generation, ModelFacts

log = logging.getLogger(__name__)

VIDEO_NAME = "video.mp4"
FRAMES_NAME = "frames.npy"
TIMELINE_NAME = "timeline.json"
REFERENCE_NAME = "reference"


class VideoMaker(Protocol):
    """What makes videos: Ray Serve deployments, or sessions in this process."""

    def generate(
        self, request: Generation, image_HWC: Frames | None
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of the video in order; closing the iterator stops the work."""
        ...

    async def check_ready(self) -> dict[str, int]:
        """Process ids by deployment.

        Raises:
            ReplicasNotReady: not every deployment answers.
        """
        ...


class Dispatcher:
    """Takes requests in and sees each to its end; begin with `start`, end with `close`."""

    def __init__(
        self, maker: VideoMaker, store: JobStore, facts: ModelFacts, limits: Limits
    ) -> None:
        self._maker, self._store, self._facts, self._limits = maker, store, facts, limits
        self._waiting: deque[str] = deque()
        # Set whenever there may be something to start: a request has come, or a place is free.
        self._arrived = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._live_spans: dict[str, list[WorkSpan]] = {}
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
            write_whole(job.folder / REFERENCE_NAME, reference)
        self._waiting.append(job.id)
        self._arrived.set()
        return job

    async def cancel(self, job_id: str) -> bool:
        """Stop an unfinished job; False where it had finished already."""
        # The row first: a job that ends in this moment then finds itself cancelled, and stays so.
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
        spans = self._live_spans.get(job.id)
        if spans is not None:
            return [span.to_dict() for span in spans]
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
                    # It was cancelled or deleted while it waited.
                    continue
                task = asyncio.create_task(self._run(self._store.require(job_id)))
                self._running[job_id] = task
                task.add_done_callback(partial(self._ended, job_id))

    def _ended(self, job_id: str, _task: asyncio.Task[None]) -> None:
        del self._running[job_id]
        self._live_spans.pop(job_id, None)
        self._arrived.set()

    async def _run(self, job: Job) -> None:
        """See one job from start to end; whatever happens, its row says so."""
        began_s = time.time()
        left_s = self._limits.deadline_s - (began_s - job.created_at)
        try:
            async with asyncio.timeout(left_s):
                video = await self._generate(job)
                await _to_its_end(
                    partial(write_results, job.folder, video, keep_frames=self._limits.keep_frames)
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
            self._store.fail(job.id, ResultNotWritten.code, str(error))
        except Exception as error:
            # A fault of ours must end this job, not the dispatcher; its row and the log both tell.
            log.exception("job %s", job.id)
            self._store.fail(job.id, ReplicaFailed.code, f"{type(error).__name__}: {error}")

    async def _generate(self, job: Job) -> GeneratedVideo:
        request = Generation.model_validate(job.request)
        image_HWC = None
        if request.given_first_frame:
            data = await asyncio.to_thread((job.folder / REFERENCE_NAME).read_bytes)
            image_HWC = await asyncio.to_thread(
                decode_image, data, max_pixels=self._limits.image_pixels
            )
        chunks: list[Chunk] = []
        spans = self._live_spans[job.id] = []
        num_frames = 0
        stream = self._maker.generate(request, image_HWC)
        # `aclosing`: a cancelled job closes the stream at once, which stops the work behind it.
        async with aclosing(stream):
            async for chunk in stream:
                chunks.append(chunk)
                spans.extend(chunk.spans)
                num_frames += len(chunk.frames)
                # 100 is only said of a video that can be fetched.
                self._store.progress(job.id, min(99.0, 100.0 * num_frames / request.num_frames))
        if num_frames != request.num_frames:
            raise ReplicaFailed(
                f"The replicas ended after {num_frames} of {request.num_frames} frames."
            )
        return join(chunks, self._facts.fps)


async def _to_its_end(work: Callable[[], None]) -> None:
    """Run blocking work in a thread; a caller that is cancelled waits until the work has ended.

    A thread cannot be stopped. If its caller went on at once, the files of a deleted video could
    come back after its folder is gone.
    """
    thread = asyncio.create_task(asyncio.to_thread(work))
    try:
        await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.gather(thread, return_exceptions=True)
        raise


def write_results(folder: Path, video: GeneratedVideo, *, keep_frames: bool) -> None:
    """Write timeline, lossless frames (where kept) and mp4, each whole or not at all.

    >>> import tempfile
    >>> video = GeneratedVideo(np.zeros((5, 32, 32, 3), np.uint8), fps=8.0, spans=())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_results(Path(folder), video, keep_frames=False)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['timeline.json', 'video.mp4']
    """
    spans = json.dumps([span.to_dict() for span in video.spans])
    write_whole(folder / TIMELINE_NAME, spans)
    if keep_frames:
        with replacing(folder / FRAMES_NAME) as unfinished, unfinished.open("wb") as file:
            np.save(file, video.frames, allow_pickle=False)
    write_whole(folder / VIDEO_NAME, encode_mp4(video.frames, video.fps))
