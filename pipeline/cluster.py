"""Where a run's Ray comes from: one of its own on this machine, or a cluster it is submitted to.

`local_or_given` is the only place that starts or stops Ray; `submit` sends a recipe to a cluster as
a Ray job. The same recipe runs in both; nothing in it changes but resources and paths. Knows
nothing of what the stages do.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowreel.errors import FlowreelError
from pipeline.recipes import ClusterConfig, Recipe, save_recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flowreel", "flow", "media", "data_prep", "training", "serving", "pipeline")
SUBMITTED_STAGES = ("demo", "prepare", "train")


class ClusterError(FlowreelError, ConnectionError):
    """A cluster that cannot be reached."""


class SubmitError(FlowreelError, ValueError):
    """A job that could not be handed to a cluster."""


@contextmanager
def local_or_given(
    config: ClusterConfig, address: str | None = None, *, needed: bool = True
) -> Iterator[None]:
    """A connected Ray: the cluster at an address, else one of our own, ended on leaving.

    Our own binds to loopback, sends no usage statistics, and keeps its files under the system's
    temporary folder.

    Args:
        config: what a Ray of our own may take of this machine.
        address: of a cluster; by default that in `RAY_ADDRESS`, as inside a job.
        needed: False where all work was done before: then none is started.

    Raises:
        ClusterError: no cluster answers at the address.
    """
    if not needed:
        yield
        return
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray gives its workers the lowest priority, so that any other busy process starves
    # them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray Data's actors make its core print a harmless error line each.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray guards its local cluster by a token; that it does needs no warning.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    given = address or os.environ.get("RAY_ADDRESS")
    try:
        _connect(config, given)
        # Set after the start, which sets it too: the service says itself where it listens.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        yield
    finally:
        # Also where the start itself was interrupted: some of Ray's processes may be up already.
        ray.shutdown()


def _connect(config: ClusterConfig, address: str | None) -> None:
    """Start Ray here, or connect to the cluster at the address."""
    import ray

    # `flowreel -v` asks for what the libraries log; else only warnings are worth a line.
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    logs: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.WARNING,
    }
    with _without_line(b"Set ray log level from environment variable"):
        if address is None:
            ray.init(
                num_cpus=config.num_cpus or os.cpu_count(),
                object_store_memory=config.object_store_mb * 1024**2,
                include_dashboard=False,
                configure_logging=True,
                _node_ip_address="127.0.0.1",
                **logs,
            )
            return
        try:
            ray.init(address=address, **logs)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster at {address} ({' '.join(str(error).split())[:200]}); start one "
                "with `ray start --head`, or leave --address and RAY_ADDRESS out"
            ) from error


@contextmanager
def _without_line(words: bytes) -> Iterator[None]:
    """Leave a line with these words out of what is written to standard error meanwhile.

    Ray's core, which is no Python, writes one there whenever its log level is set.
    """
    sys.stderr.flush()
    error_output = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(error_output, 2)
            os.close(error_output)
            held.seek(0)
            for line in held:
                if words not in line:
                    os.write(2, line)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Keep Ctrl-C a KeyboardInterrupt while Ray Train runs.

    Ray Train puts a handler of its own in place, which ends the process by SystemExit, with exit
    code 0 or 1 as it happens, and leaves it there for whatever comes after the training.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    # Python writes the number of every signal there, whoever handles it.
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    except BaseException as error:
        if _has_interrupt(reader):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, handler)
        os.close(reader)
        os.close(writer)


def _has_interrupt(reader: int) -> bool:
    try:
        return signal.SIGINT in os.read(reader, 4096)
    except BlockingIOError:
        return False  # no signal at all


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster: its id, its last status and its log so far."""

    job_id: str
    status: str
    logs: str


def submit(
    recipe: Recipe,
    address: str,
    *,
    stage: str = "demo",
    arguments: list[str] | None = None,
    wait: bool = True,
    timeout_s: float = 24 * 3600.0,
) -> Submitted:
    """Run `flowreel STAGE` with this recipe as a job of a cluster.

    Args:
        recipe: travels resolved, as YAML, with the packages of this checkout.
        address: of the cluster's dashboard, such as `http://127.0.0.1:8265`.
        stage: one of `SUBMITTED_STAGES`.
        arguments: further command-line arguments of the stage, such as
            `["--out", "/mnt/shared/run1"]`.
        wait: until the job has ended, else return at once.
        timeout_s: how long to wait; the job goes on after that.

    Raises:
        SubmitError: no cluster at the address or none that takes jobs, an unknown stage, or no
            `--out` in `arguments`.
    """
    if stage not in SUBMITTED_STAGES:
        raise SubmitError(f"stage {stage!r}; allowed: {', '.join(SUBMITTED_STAGES)}")
    names_out = (part in ("--out", "-o") or part.startswith("--out=") for part in arguments or [])
    if not any(names_out):
        raise SubmitError(
            "a job's own folder is gone when it ends: give the stage an --out on storage that the "
            f"cluster's machines share, as in flowreel submit {recipe.name} --address {address} -- "
            "--out /mnt/shared/run1"
        )
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise SubmitError(
            f"no Ray jobs server at {address} ({' '.join(str(error).split())[:200]}); "
            "give the dashboard's address, such as http://127.0.0.1:8265"
        ) from error
    with tempfile.TemporaryDirectory(prefix="flowreel-submit-") as folder:
        _stage_code(Path(folder), recipe)
        try:
            job_id = client.submit_job(
                entrypoint=_entrypoint(stage, arguments or []),
                runtime_env={"working_dir": folder},
                metadata={"recipe": recipe.name, "stage": stage},
            )
        except RuntimeError as error:
            # So Ray says whatever its dashboard answers, a cluster that is still starting included.
            raise SubmitError(
                f"the cluster at {address} took no job ({' '.join(str(error).split())[:200]}); "
                "if it has just been started, try again in a minute"
            ) from error
    deadline = time.monotonic() + timeout_s
    status = client.get_job_status(job_id)
    while wait and not status.is_terminal() and time.monotonic() < deadline:
        time.sleep(1.0)
        status = client.get_job_status(job_id)
    logs = client.get_job_logs(job_id) if status != JobStatus.PENDING else ""
    return Submitted(job_id, status.value, logs)


def _entrypoint(stage: str, arguments: list[str]) -> str:
    """The job's shell line: this interpreter where the cluster has it too, else its `python`."""
    command = shlex.join(["-m", "pipeline.cli", stage, "--recipe", "recipe.yaml", *arguments])
    return f'PY={shlex.quote(sys.executable)}; [ -x "$PY" ] || PY=python; exec "$PY" {command}'


def _stage_code(folder: Path, recipe: Recipe) -> None:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    save_recipe(recipe, folder, bucket_as_given=True)
