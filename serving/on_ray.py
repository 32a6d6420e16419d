"""The service on Ray: three Serve deployments around the same sessions that run in one process
without Ray.

    client ── HTTP ── Api ── one streaming call ── FrameDecoder ── one streaming call ── DeepBlock
                       (requests, jobs, media)      (f_S⁻¹, denoiser, codec)             (text, f_D)

A session is its streaming call: Serve routes the call once, to one replica of each stage, and it
stays there until the video is done. So a session needs no address, and any number of replicas of
either stage works. While the decoder turns u_n into RGB in its process, the deep block makes
u_{n+1} in its own.

Serve's streams have no back-pressure, so the decoder grants credit: the deep block may be
`credit_frames` ahead of what has been decoded, no more. A grant is sent to all replicas of the deep
block, because a unary call would be routed to any of them, and could wait behind the very sessions
that it would set free; the one that has the session takes it.

The caller starts Ray. Knows nothing of recipes or the command line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.config import ControllerOptions, HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from flow.model_folder import read_spec
from serving.api import create_app
from serving.config import Limits, Resources, Sampler
from serving.job_store import JobStore
from serving.messages import Chunk, DeepFrame, Frames, Opening, PackedTensor, Stage
from serving.replica import ComputeThread, Credit
from serving.requests import (
    Generation,
    ModelFacts,
    ServingError,
    StageFailed,
    StagesNotReady,
)
from serving.session import (
    DecoderSession,
    DeepSession,
    Device,
    LoadedModel,
    encode_first_frame,
    load,
    model_facts,
)
from serving.start import (
    ServeStartError,
    bindable_port,
    process_runs,
    wait_ready,
)

APP_NAME = "flowreel"
# Serve kills an HTTP proxy that is not up in 5 s, and again; on a busy laptop its imports take longer.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageConfig:
    """How a stage replica loads the model and computes; crosses to its process."""

    model_dir: str
    device: Device
    sampler: Sampler
    dtype: Literal["float32", "bfloat16"]
    threads: int
    credit_frames: int
    restarts: int


class DeepBlock:
    """Text encoder and deep block: a stream of an `Opening` and then `DeepFrame`s for each
    request.
    """

    def __init__(self, config: StageConfig) -> None:
        self._config = config
        self._work = ComputeThread(config.threads)
        self._loaded = _load_stage(config, "deep")
        self._credits: dict[str, Credit] = {}

    async def stream(
        self, request: Generation, first_u: PackedTensor | None, emitted: list[PackedTensor]
    ) -> AsyncGenerator[Opening | DeepFrame, None]:
        """The opening, then the frames after those `emitted` before."""
        allowed = len(emitted) + self._config.credit_frames
        credit = self._credits[request.request_id] = Credit(allowed)
        try:
            session = await self._work(DeepSession, self._loaded, request, first_u, emitted)
            yield session.opening
            for index in range(len(emitted), request.latent_frames):
                await credit.wait_for(index)
                yield await self._work(session.next)
        finally:
            del self._credits[request.request_id]

    async def grant(self, request_id: str, allowed: int) -> None:
        """Let a session make frames up to `allowed`; of no effect on a replica that does not have
        it.
        """
        credit = self._credits.get(request_id)
        if credit is not None:
            credit.raise_to(allowed)

    async def ping(self) -> int:
        return os.getpid()


class FrameDecoder:
    """Shallow inverse, denoiser and codec: a stream of `Chunk`s for each request, fed by a stream
    from DeepBlock.
    """

    def __init__(self, config: StageConfig, deep: DeploymentHandle) -> None:
        self._config = config
        self._deep = deep
        self._work = ComputeThread(config.threads)
        self._loaded = _load_stage(config, "decode")

    async def decode(
        self, request: Generation, image_HWC: Frames | None
    ) -> AsyncGenerator[Chunk, None]:
        first_u = None
        if image_HWC is not None:
            first_u = await self._work(encode_first_frame, self._loaded, request, image_HWC)
        session: DecoderSession | None = None
        async with aclosing(self._deep_frames(request, first_u)) as items:
            async for item in items:
                if isinstance(item, Opening):
                    session = await self._work(DecoderSession, self._loaded, request, item)
                    continue
                assert session is not None, "the deep block opens with the text"
                chunk = await self._work(session.push, item)
                await self._grant(request, item.index)
                yield chunk
        assert session is not None
        yield await self._work(session.finish)

    async def _deep_frames(
        self, request: Generation, first_u: PackedTensor | None
    ) -> AsyncGenerator[Opening | DeepFrame, None]:
        """The deep block's stream. Where its replica dies, another goes on after the frames that
        came.
        """
        emitted: list[PackedTensor] = []
        opened = False
        for restarts_left in range(self._config.restarts, -1, -1):
            stream = self._deep.options(stream=True).stream.remote(request, first_u, emitted)
            try:
                async for item in stream:
                    if isinstance(item, DeepFrame):
                        emitted.append(item.u)
                        yield item
                    elif not opened:
                        opened = True
                        yield item
                return
            except RayActorError:
                if restarts_left == 0:
                    raise
                log.warning("%s: deep block lost after %d", request.request_id, len(emitted))
            finally:
                stream.cancel()

    async def _grant(self, request: Generation, decoded: int) -> None:
        granted = decoded + self._config.credit_frames
        if granted >= request.latent_frames:
            return
        try:
            await self._deep.broadcast("grant", request.request_id, granted + 1).results_async()
        except (RayActorError, RayServeException) as error:
            # Its stream breaks too, and the next one starts with credit of its own.
            log.warning("%s: grant lost: %s", request.request_id, type(error).__name__)

    async def ping(self) -> list[int]:
        """Process ids of the stages that answered: this one and a deep block."""
        return [os.getpid(), await self._deep.ping.remote()]


def _load_stage(config: StageConfig, stage: Stage) -> LoadedModel:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    return load(
        config.model_dir,
        device=config.device,
        dtype=dtype,
        sampler=config.sampler,
        stage=stage,
    )


class RayStages:
    """`serving.dispatcher.Stages` over the deployments."""

    def __init__(self, decoder: DeploymentHandle, ready_timeout_s: float) -> None:
        self._decoder, self._ready_timeout_s = decoder, ready_timeout_s

    async def generate(
        self, request: Generation, image_HWC: Frames | None
    ) -> AsyncGenerator[Chunk, None]:
        chunks = self._decoder.options(stream=True).decode.remote(request, image_HWC)
        try:
            async for chunk in chunks:
                yield chunk
        except RayTaskError as error:
            cause = _first_cause(error)
            if isinstance(cause, ServingError):
                raise cause from error
            raise StageFailed(f"{type(cause).__name__}: {cause}") from error
        except (RayActorError, RayServeException) as error:
            raise StageFailed(f"A stage's replica was lost ({type(error).__name__}).") from error
        finally:
            chunks.cancel()

    async def check_ready(self) -> dict[str, int]:
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                decoder, deep = await self._decoder.ping.remote()
        except (TimeoutError, RayTaskError, RayActorError, RayServeException) as error:
            raise StagesNotReady(
                f"The stages did not answer within {self._ready_timeout_s:g} s "
                f"({type(error).__name__})."
            ) from error
        return {"api": os.getpid(), "decode": decoder, "deep": deep}


def _first_cause(error: BaseException) -> BaseException:
    # A failure of the deep block reaches the Api wrapped once for each process it crossed.
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
        self._stages = RayStages(decoder, ready_timeout_s)
        self._facts, self._limits, self._data_dir = facts, limits, data_dir

    def __serve_build_asgi_app__(self) -> ASGIApp:
        store = JobStore(Path(self._data_dir))
        return create_app(self._stages, store, self._facts, self._limits)


@dataclass
class ServedApp:
    """A running service. `stop()` it, or use it as a context manager."""

    url: str
    local_pids: dict[str, int]

    def stop(self, timeout_s: float = 20.0) -> None:
        """Shut Serve down and wait until its replicas' processes are gone. Ray itself is left
        running.
        """
        serve.shutdown()
        give_up_s = time.monotonic() + timeout_s
        while left := [name for name, pid in self.local_pids.items() if process_runs(pid)]:
            if time.monotonic() > give_up_s:
                raise ServeStartError(f"still running {timeout_s:g} s after shutdown: {left}")
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()


def serve_model(
    model_dir: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    data_dir: str | Path,
    limits: Limits | None = None,
    resources: Resources | None = None,
    sampler: Sampler | None = None,
    name: str | None = None,
    start_timeout_s: float = 180.0,
) -> ServedApp:
    """Start the service for a model folder, and return when it answers that it is ready.

    Ray must be initialised. Serve must not be running in this cluster yet.

    Args:
        host: address to listen on; loopback unless told otherwise.
        port: 0 takes a free one.
        data_dir: jobs and videos; kept when the service stops.
        name: the model id that clients see; the folder's name if None.

    Raises:
        CheckpointError, InvalidRequest: the folder holds no model that makes videos.
        ServeStartError: no Ray, the port is taken, or not ready in time.

    Example:
        with serve_model("runs/demo/model", data_dir="runs/demo/served", port=0) as app:
            print(app.url)
    """
    if sampler is not None and sampler.denoiser == "score":
        raise ServeStartError(
            "sampler.denoiser = 'score' needs the whole clip and the whole flow in one process, and a service streams "
            "from a decoder without the deep block: serve with 'learned' or 'none', or use "
            "`flowreel sample --denoiser score`"
        )
    if not ray.is_initialized():
        raise ServeStartError("Ray is not initialised; call ray.init(...) before serve_model.")
    if serve.status().proxies:
        raise ServeStartError(
            "Serve already runs in this Ray cluster; stop it, or use another one."
        )
    limits, resources = limits or Limits(), resources or Resources()
    folder = Path(model_dir).resolve()
    facts = model_facts(read_spec(folder), name or folder.name)
    port = bindable_port(host, port)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    app = _application(
        folder, facts, limits, resources, sampler or Sampler(), Path(data_dir).resolve()
    )
    url = f"http://{host}:{port}"
    try:
        # Serve waits 60 s for its proxy and then raises, though it goes on starting it; `wait_ready`
        # is what decides.
        with suppress(TimeoutError):
            serve.start(
                proxy_location="HeadOnly",
                http_options=HTTPOptions(host=host, port=port),
                controller_options=ControllerOptions(runtime_env={"env_vars": PATIENCE}),
            )
        with suppress(TimeoutError):
            serve.run(app, name=APP_NAME, route_prefix="/", logging_config=quiet)
        pids = wait_ready(url, start_timeout_s)
    except RayActorError as error:
        serve.shutdown()
        raise ServeStartError(f"Ray Serve did not start: {error}") from error
    except BaseException:
        serve.shutdown()
        raise
    # Process ids say something only where all replicas are on this machine.
    return ServedApp(url, pids if len(ray.nodes()) == 1 else {})


def _application(
    folder: Path,
    facts: ModelFacts,
    limits: Limits,
    resources: Resources,
    sampler: Sampler,
    data_dir: Path,
) -> Application:
    def stage(gpus: float) -> StageConfig:
        return StageConfig(
            str(folder),
            "cuda" if gpus > 0 else "cpu",
            sampler,
            resources.dtype,
            resources.threads,
            resources.credit_frames,
            resources.restarts,
        )

    # Sessions in flight are bounded by the Api; the rest is room for pings beside them.
    options: dict[str, Any] = {
        "max_ongoing_requests": limits.concurrent + 8,
        "graceful_shutdown_timeout_s": 5.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": 1,
    }
    deep = serve.deployment(
        DeepBlock,
        num_replicas=resources.deep_replicas,
        ray_actor_options={"num_cpus": resources.deep_cpus, "num_gpus": resources.deep_gpus},
        **options,
    ).bind(stage(resources.deep_gpus))
    decoder = serve.deployment(
        FrameDecoder,
        num_replicas=resources.decoder_replicas,
        ray_actor_options={"num_cpus": resources.decoder_cpus, "num_gpus": resources.decoder_gpus},
        **options,
    ).bind(stage(resources.decoder_gpus), deep)
    return serve.deployment(
        Api,
        num_replicas=1,
        ray_actor_options={"num_cpus": resources.api_cpus},
        **{**options, "max_ongoing_requests": 256},
    ).bind(decoder, facts, limits, str(data_dir), resources.ready_timeout_s)
