"""A Ray cluster whose head has no CPUs and whose machines, processes here, an autoscaler starts."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.data_prep.ray_cluster import RAY_ENVIRONMENT

STORE_BYTES = 100 * 2**20
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
MARK = "FLOWREEL_TEST_CLUSTER"


@contextmanager
def growing_cluster(folder: Path, machine_cpus: int, machines: int) -> Iterator[str]:
    """The address of one. Everything that it started is gone afterwards.

    Ray's own `AutoscalingCluster` stops every Ray of the machine first, and its provider's defaults
    are not in the wheel; so the head is started here, with that provider named from outside.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    address = f"127.0.0.1:{port}"
    config = folder / "cluster.json"
    config.write_text(json.dumps(_config(address, machine_cpus, machines)))
    mark = secrets.token_hex(8)
    environment = {
        **os.environ, **RAY_ENVIRONMENT, MARK: mark, "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1",
    }  # fmt: skip
    log = (folder / "head.log").open("wb")
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            f"--port={port}", "--num-cpus=0", f"--autoscaling-config={config}",
            f"--temp-dir={folder}/ray", "--include-dashboard=false",
            f"--object-store-memory={STORE_BYTES}", "--node-ip-address=127.0.0.1",
        ],
        env=environment, start_new_session=True,
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log.close()
    try:
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert head.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        _end_marked(mark)
        head.wait()


def _config(address: str, machine_cpus: int, machines: int) -> dict[str, object]:
    lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "rsync_filter",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files", "rsync_exclude",
    )  # fmt: skip
    machine = {"CPU": machine_cpus, "object_store_memory": STORE_BYTES}
    return {
        **{name: [] for name in lists},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "cluster_name": "growing",
        "max_workers": machines,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 10,
        "file_mounts_sync_continuously": False,
        "provider": {"type": "external", "module": PROVIDER, "gcs_address": address},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "machine": {
                "resources": machine, "node_config": {}, "min_workers": 0, "max_workers": machines,
            },
        },
    }  # fmt: skip


def _end_marked(mark: str) -> None:
    """Kill what carries the mark: Ray's processes do not all belong to their head's group."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
