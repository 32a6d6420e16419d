"""Starting and stopping the service on Ray Serve: `serve_model(ServiceSpec(...))`.

The caller starts Ray. What the three deployments do is in `serving.deployments.on_ray`. Knows
nothing of recipes or the command line.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import ControllerOptions, HTTPOptions
from ray.serve.schema import LoggingConfig

from flow.model_folder import read_spec
from serving.config import ServiceSpec
from serving.deployments.on_ray import Api, DeepBlock, FrameDecoder, ReplicaConfig
from serving.loading import model_facts
from serving.requests import ModelFacts
from serving.start import ServeStartError, bindable_port, process_runs, wait_ready

APP_NAME = "flowreel"

_CONTROLLER_ENVIRONMENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Serve kills an HTTP proxy that is not up in 5 s, again and again; on a busy laptop the proxy's
imports take longer than that."""


@dataclass
class ServedApp:
    """A running service. `stop()` it, or use it as a context manager.

    Attributes:
        url: where it listens.
        local_pids: process ids by deployment; empty where replicas may be on other machines.
    """

    url: str
    local_pids: dict[str, int]

    def stop(self, timeout_s: float = 20.0) -> None:
        """Shut Serve down and wait until its replicas' processes are gone; Ray is left running.

        Raises:
            ServeStartError: a process is still there after `timeout_s`.
        """
        serve.shutdown()
        give_up_s = time.monotonic() + timeout_s
        # `serve.shutdown` returns before the processes end; a caller may delete their data next.
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


def serve_model(service: ServiceSpec) -> ServedApp:
    """Start a service, and return when it answers that it is ready.

    Ray must be initialised. Serve must not be running in this cluster yet.

    Raises:
        CheckpointError, InvalidRequest: the folder holds no model that makes videos.
        ServeStartError: no Ray, the port is taken, or not ready in time.

    Example:
        with serve_model(ServiceSpec("runs/demo/model", data_dir="runs/demo/served")) as app:
            print(app.url)
    """
    _check_can_start(service)
    facts = model_facts(read_spec(Path(service.model_dir)), service.model_name)
    port = bindable_port(service.host, service.port)
    url = f"http://{service.host}:{port}"
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    try:
        # Serve waits 60 s for its proxy and then raises, though it goes on starting it. So its
        # time-out decides nothing here; `wait_ready` does.
        with suppress(TimeoutError):
            serve.start(
                proxy_location="HeadOnly",
                http_options=HTTPOptions(host=service.host, port=port),
                controller_options=ControllerOptions(
                    runtime_env={"env_vars": _CONTROLLER_ENVIRONMENT}
                ),
            )
        with suppress(TimeoutError):
            app = _application(service, facts)
            serve.run(app, name=APP_NAME, route_prefix="/", logging_config=quiet)
        pids = wait_ready(url, service.start_timeout_s)
    except RayActorError as error:
        serve.shutdown()
        raise ServeStartError(f"Ray Serve did not start: {error}") from error
    except BaseException:
        # Also on Ctrl-C: half a service left in the cluster would refuse the next one.
        serve.shutdown()
        raise
    # Process ids say something only where all replicas are on this machine.
    return ServedApp(url, pids if len(ray.nodes()) == 1 else {})


def _check_can_start(service: ServiceSpec) -> None:
    """Refuse what can be known to fail before anything is started."""
    if service.sampling.denoiser == "score":
        raise ServeStartError(
            "sampler.denoiser = 'score' needs the whole clip and the whole flow in one process, "
            "and a service streams from a decoder without the deep block: serve with 'learned' or "
            "'none', or use `flowreel sample --denoiser score`"
        )
    if not ray.is_initialized():
        raise ServeStartError("Ray is not initialised; call ray.init(...) before serve_model.")
    if serve.status().proxies:
        raise ServeStartError(
            "Serve already runs in this Ray cluster; stop it, or use another one."
        )


def _application(service: ServiceSpec, facts: ModelFacts) -> Application:
    """The three deployments, each bound to the one that it calls."""
    limits, resources = service.limits, service.resources

    def replica_config(gpus: float) -> ReplicaConfig:
        # Whole paths: a replica's working folder is Ray's, not the caller's.
        folder = str(Path(service.model_dir).resolve())
        return ReplicaConfig(folder, "cuda" if gpus > 0 else "cpu", service.sampling, resources)

    options: dict[str, Any] = {
        # Sessions in flight are bounded by the Api; the rest is room for pings and grants.
        "max_ongoing_requests": limits.concurrent + 8,
        "graceful_shutdown_timeout_s": 5.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        # A model that does not load will not load the next time either.
        "max_constructor_retry_count": 1,
    }
    deep = serve.deployment(
        DeepBlock,
        num_replicas=resources.deep_replicas,
        ray_actor_options={"num_cpus": resources.deep_cpus, "num_gpus": resources.deep_gpus},
        **options,
    ).bind(replica_config(resources.deep_gpus))
    decoder = serve.deployment(
        FrameDecoder,
        num_replicas=resources.decoder_replicas,
        ray_actor_options={"num_cpus": resources.decoder_cpus, "num_gpus": resources.decoder_gpus},
        **options,
    ).bind(replica_config(resources.decoder_gpus), deep)
    return serve.deployment(
        Api,
        num_replicas=1,
        ray_actor_options={"num_cpus": resources.api_cpus},
        # Its requests are short, and a client that polls must not wait for one that downloads.
        **{**options, "max_ongoing_requests": 256},
    ).bind(decoder, facts, limits, str(Path(service.data_dir).resolve()), resources.ready_timeout_s)
