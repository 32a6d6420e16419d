"""The three deployments on Ray Serve, around the same sessions that run in one process without Ray.

    client ── HTTP ── Api ── one streaming call ── FrameDecoder ── one streaming call ── DeepBlock
                       (requests, jobs, media)      (f_S⁻¹, denoiser, codec)             (text, f_D)

A session is its streaming call: Serve routes the call once, to one replica of each deployment, and
it stays there until the video is done. So a session needs no address, and any number of replicas of
either works. While FrameDecoder turns u_n into RGB in its process, DeepBlock makes u_{n+1} in its
own.

Serve's streams have no back-pressure, so FrameDecoder grants credit: DeepBlock may be
`credit_frames` ahead of what has been decoded, no more. A grant is sent to all replicas of
DeepBlock, and the one that has the session takes it. A unary call would be routed to any of them,
and could wait behind the very sessions that it would set free.

Knows nothing of recipes or the command line; `serving.on_ray` starts what is here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from media.frames import Frames
from serving.api import create_app
from serving.config import Limits, Resources, SamplingConfig
from serving.errors import ReplicaFailed, ReplicasNotReady, ServingError
from serving.job_store import JobStore
from serving.loading import Device, LoadedModel, load
from serving.messages import Chunk, DeepFrame, DeploymentName, Opening, PackedTensor
from serving.replica import ComputeThread, Credit
from serving.requests import Generation, ModelFacts
from serving.session import DecoderSession, DeepSession, encode_first_frame

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ReplicaConfig:
    """How a replica of DeepBlock or FrameDecoder loads the model and computes.

    It crosses to the replica's process, so the model travels as its folder's path.
    """

    model_dir: str
    device: Device
    sampling: SamplingConfig
    resources: Resources

    def load(self, deployment: DeploymentName) -> LoadedModel:
        """As much of the model as this deployment needs."""
        return load(
            self.model_dir,
            device=self.device,
            dtype=_DTYPES[self.resources.dtype],
            sampling=self.sampling,
            deployment=deployment,
        )


class DeepBlock:
    """Text encoder and deep block: streams an `Opening`, then `DeepFrame`s, for each request."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._credit_frames = config.resources.credit_frames
        self._work = ComputeThread(config.resources.threads)
        self._loaded = config.load("deep")
        self._credits: dict[str, Credit] = {}

    async def stream(
        self, request: Generation, first_u: PackedTensor | None, earlier_u: list[PackedTensor]
    ) -> AsyncGenerator[Opening | DeepFrame, None]:
        """The opening, then the frames of u that follow `earlier_u`.

        Args:
            request: the video.
            first_u: a client's first frame.
            earlier_u: what another replica made of this video before it died.
        """
        credit = Credit(len(earlier_u) + self._credit_frames)
        self._credits[request.request_id] = credit
        try:
            session = await self._work(DeepSession, self._loaded, request, first_u, earlier_u)
            yield session.opening
            for index in range(len(earlier_u), session.num_latent_frames):
                await credit.wait_for(index)
                yield await self._work(session.next)
        finally:
            # A client that goes away closes this generator wherever it is.
            del self._credits[request.request_id]

    async def grant(self, request_id: str, num_frames: int) -> None:
        """Let a session make so many frames; without effect on a replica that does not have it."""
        credit = self._credits.get(request_id)
        if credit is not None:
            credit.raise_to(num_frames)

    async def ping(self) -> int:
        """The id of this process, which answers even while the compute thread is busy."""
        return os.getpid()


class FrameDecoder:
    """Shallow inverse, denoiser and codec: streams `Chunk`s, fed by a stream from DeepBlock."""

    def __init__(self, config: ReplicaConfig, deep: DeploymentHandle) -> None:
        self._resources = config.resources
        self._deep = deep
        self._work = ComputeThread(config.resources.threads)
        self._loaded = config.load("decode")

    async def decode(
        self, request: Generation, image_HWC: Frames | None
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of RGB frames, in order, until the video is whole."""
        first_u = None
        if image_HWC is not None:
            # The image needs the codec and the shallow stack, which are here and not in DeepBlock.
            first_u = await self._work(encode_first_frame, self._loaded, request, image_HWC)
        session: DecoderSession | None = None
        async with aclosing(self._deep_frames(request, first_u)) as items:
            async for item in items:
                if isinstance(item, Opening):
                    session = await self._work(DecoderSession, self._loaded, request, item)
                    continue
                assert session is not None, "DeepBlock opens with the text"
                chunk = await self._work(session.push, item)
                # Before the chunk leaves, so that a slow reader does not hold DeepBlock back.
                await self._grant(request, item.index)
                yield chunk
        assert session is not None
        yield await self._work(session.finish)

    async def _deep_frames(
        self, request: Generation, first_u: PackedTensor | None
    ) -> AsyncGenerator[Opening | DeepFrame, None]:
        """DeepBlock's stream; where its replica dies, another goes on after the frames that came.

        That is why u is kept here until the video is whole: all state of a deep session can be
        rebuilt from the request and the frames of u made so far.
        """
        earlier_u: list[PackedTensor] = []
        has_opened = False
        for restarts_left in range(self._resources.restarts, -1, -1):
            stream = self._deep.options(stream=True).stream.remote(request, first_u, earlier_u)
            try:
                async for item in stream:
                    if isinstance(item, DeepFrame):
                        earlier_u.append(item.u)
                        yield item
                    elif not has_opened:
                        # The next replica opens with the same text again; it is not wanted twice.
                        has_opened = True
                        yield item
                return
            except RayActorError:
                # Only a death is worth another try: a replica that raised would raise again.
                if restarts_left == 0:
                    raise
                log.warning("%s: deep block lost after %d", request.request_id, len(earlier_u))
            finally:
                # Leaving the loop does not end the call: without this the replica would make the
                # rest of a cancelled video.
                stream.cancel()

    async def _grant(self, request: Generation, last_decoded: int) -> None:
        """Let the session make frames up to `credit_frames` beyond the one that is decoded."""
        num_frames = last_decoded + 1 + self._resources.credit_frames
        if num_frames > request.latent_frames(self._loaded.facts.factors):
            return
        try:
            grants = self._deep.broadcast("grant", request.request_id, num_frames)
            await grants.results_async()
        except (RayActorError, RayServeException) as error:
            # Its stream breaks too, and the next one starts with credit of its own.
            log.warning("%s: grant lost: %s", request.request_id, type(error).__name__)

    async def ping(self) -> list[int]:
        """Process ids of the replicas that answered: this one and one of DeepBlock."""
        return [os.getpid(), await self._deep.ping.remote()]


class DeployedVideoMaker:
    """`serving.dispatcher.VideoMaker` over the deployments."""

    def __init__(self, decoder: DeploymentHandle, ready_timeout_s: float) -> None:
        self._decoder, self._ready_timeout_s = decoder, ready_timeout_s

    async def generate(
        self, request: Generation, image_HWC: Frames | None
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of the video in order; closing the iterator stops the work.

        Raises:
            ServingError: what a session raised, or ReplicaFailed for anything else.
        """
        chunks = self._decoder.options(stream=True).decode.remote(request, image_HWC)
        try:
            async for chunk in chunks:
                yield chunk
        except RayTaskError as error:
            cause = _first_cause(error)
            if isinstance(cause, ServingError):
                raise cause from error
            raise ReplicaFailed(f"{type(cause).__name__}: {cause}") from error
        except (RayActorError, RayServeException) as error:
            raise ReplicaFailed(f"A replica was lost ({type(error).__name__}).") from error
        finally:
            chunks.cancel()

    async def check_ready(self) -> dict[str, int]:
        """Process ids by deployment.

        Raises:
            ReplicasNotReady: they do not answer within `ready_timeout_s`.
        """
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                decoder, deep = await self._decoder.ping.remote()
        except (TimeoutError, RayTaskError, RayActorError, RayServeException) as error:
            raise ReplicasNotReady(
                f"The replicas did not answer within {self._ready_timeout_s:g} s "
                f"({type(error).__name__})."
            ) from error
        return {"api": os.getpid(), "decode": decoder, "deep": deep}


def _first_cause(error: BaseException) -> BaseException:
    # A failure of DeepBlock reaches the Api wrapped once for each process it crossed.
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


@serve.ingress()
class Api:
    """The HTTP side. One replica: it owns the queue and the job store of its data folder."""

    def __init__(
        self,
        decoder: DeploymentHandle,
        facts: ModelFacts,
        limits: Limits,
        data_dir: str,
        ready_timeout_s: float,
    ) -> None:
        self._maker = DeployedVideoMaker(decoder, ready_timeout_s)
        self._facts, self._limits, self._data_dir = facts, limits, data_dir

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app, built in the replica: a store has an open file, which cannot be sent there."""
        store = JobStore(Path(self._data_dir))
        return create_app(self._maker, store, self._facts, self._limits)
