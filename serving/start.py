"""Ports, readiness over HTTP, and the error of a service that does not start.

Knows nothing of Ray or models.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

import httpx

from flowreel.errors import FlowreelError


class ServeStartError(FlowreelError, RuntimeError):
    """The service could not be started or stopped; the message says why."""


def bindable_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        ServeStartError: nothing can listen there.
    """
    with socket.socket() as probe:
        # A port whose last connection is closing may be bound again, as the server will do.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeStartError(
                f"cannot listen on {host}:{port} ({error.strerror}); "
                "choose another port, or 0 for a free one"
            ) from error
        return int(probe.getsockname()[1])


def process_runs(pid: int) -> bool:
    """Whether a process with this id is on this machine; as Linux tells it."""
    return Path(f"/proc/{pid}").exists()


def wait_ready(url: str, timeout_s: float) -> dict[str, int]:
    """Process ids by deployment, once `/health` says ready.

    Raises:
        ServeStartError: it does not within `timeout_s`; the message has the last answer.
    """
    give_up_s = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < give_up_s:
        try:
            answer = httpx.get(f"{url}/health", timeout=10)
            if answer.status_code == 200:
                return dict(answer.json()["pids"])
            last = f"{answer.status_code} {answer.text[:300]}"
        except httpx.TransportError as error:
            # Nothing listens yet, or a replica is being replaced.
            last = type(error).__name__
        time.sleep(0.1)
    raise ServeStartError(
        f"{url}/health was not ready within {timeout_s:g} s; the last answer: {last}"
    )
