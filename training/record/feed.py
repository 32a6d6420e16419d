"""Feeds MLflow from a run's folder: while it trains, after an outage, or once it is long over.

The history file is the truth. A thread of the driver reads what is new in it and sends that; when
the store does not answer, training does not notice, and the thread begins again where the store
says it stopped. `tracking.py` knows what is sent. Knows nothing of torch.

    FlowreelError, RuntimeError
    └── TrackingError    a folder that was not tracked, or a store that does not take it
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowreel.errors import FlowreelError
from training.record.history import HISTORY_NAME, HistoryPlace, records_after
from training.record.registry import register_model
from training.record.tracking import (
    TRACKING_NAME,
    Tracking,
    artifact_folder,
    is_file,
    mlflow_client,
    opened_run,
    send_figures,
    send_records,
    set_deadlines,
    steps_recorded,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

LINES_PER_READ = 500
POLL_S = 2.0
"""Between looks at the history."""
RETRY_S = 15.0
"""Between attempts while the store does not answer."""
LAST_RETRY_S = 0.5
"""The same at a run's end."""
END_S, FILE_END_S, KILLED_END_S = 20.0, 600.0, 2.0
"""At a run's end a server is waited for this long after its last answer; a store of files longer:
it may be busy, but it is not away."""
_log = logging.getLogger(__name__)


class TrackingError(FlowreelError, RuntimeError):
    """A run that MLflow has not, or not all of; what is missing can be sent again."""


class Sender:
    """Sends a run's folder, from where the store has it.

    Args:
        out: the run's folder, with `tracking.json`.
        tracking: what that file says.

    Attributes:
        steps: steps that the store has.
        answered_s: when the store last took something, on the monotonic clock.
    """

    def __init__(self, out: Path, tracking: Tracking) -> None:
        self.out = out
        self.tracking = tracking
        self.steps = 0
        self.answered_s = 0.0
        self._client: MlflowClient | None = None
        self._run: Run | None = None
        self._place = HistoryPlace()
        self._lock = threading.Lock()

    def send(self) -> None:
        """Send all that the store does not have; of a run that has ended, its files and end too.

        Raises:
            Exception: whatever MLflow's client raises. The next call asks the store anew how far it
                is, so that nothing is sent twice or left out.
        """
        # Asked first: lines written before a run was said to have ended are read after this.
        has_ended = self.tracking.status != "RUNNING"
        try:
            client, run = self._open()
            self._send_history(client, str(run.info.run_id))
            if has_ended and not self.tracking.is_complete:
                self._send_end(client, run)
        except BaseException:
            self._run = None
            raise

    def note(self, **changes: Any) -> None:
        """Change what is known of the run, in `tracking.json` too; from any thread."""
        with self._lock:
            self.tracking = replace(self.tracking, **changes)
            self.tracking.write(self.out)

    def _open(self) -> tuple[MlflowClient, Run]:
        if self._client is None:
            self._client = mlflow_client(self.tracking.uri)
        if self._run is None:
            self._run = opened_run(self._client, self.tracking, self.out)
            self.steps, self._place = steps_recorded(self._run), HistoryPlace()
            self.note(run_id=str(self._run.info.run_id))
            self.answered_s = time.monotonic()
        return self._client, self._run

    def _send_history(self, client: MlflowClient, run_id: str) -> None:
        path = self.out / HISTORY_NAME
        while True:
            records, place = records_after(path, self._place, LINES_PER_READ)
            if not records:
                return
            # A resumed run takes some steps again, and to the same result.
            new = [record for record in records if record["step"] >= self.steps]
            if new:
                send_records(client, run_id, new)
                self.steps = int(new[-1]["step"]) + 1
            self._place = place
            self.answered_s = time.monotonic()

    def _send_end(self, client: MlflowClient, run: Run) -> None:
        tracking, run_id = self.tracking, str(run.info.run_id)
        send_figures(client, run_id, tracking.figures)
        for name in tracking.artifacts:
            client.log_artifact(run_id, str(self.out / name), artifact_folder(name))
            self.answered_s = time.monotonic()
        for key, value in tracking.tags.items():
            client.set_tag(run_id, key, value)
        if tracking.model is not None:
            version = register_model(client, run, tracking.model)
            client.set_tag(run_id, "model_version", f"{tracking.model.name}/{version}")
        client.set_terminated(run_id, tracking.status)
        self.note(is_complete=True)


class Feed:
    """Keeps MLflow up with a run while it trains, in a thread of its own.

    Args:
        out: the run's folder, shared with whoever writes its history.
        tracking: what MLflow is to know beside the history.
        retry_s: seconds between attempts while the store does not answer.
        end_s: seconds that a store may be silent for at the run's end; by default `END_S` of a
            server, `FILE_END_S` of files.
    """

    def __init__(
        self, out: Path, tracking: Tracking, *, retry_s: float = RETRY_S, end_s: float | None = None
    ) -> None:
        set_deadlines()
        self.retry_s = retry_s
        self.end_s = end_s or (FILE_END_S if is_file(tracking.uri) else END_S)
        self._sender = Sender(out, tracking)
        self._sender.note()
        self._wake, self._given_up = threading.Event(), threading.Event()
        # A daemon: a store that holds a call must not hold the process at its end.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def tracking(self) -> Tracking:
        """What MLflow is to know of the run; its `run_id` once the store has answered."""
        return self._sender.tracking

    def close(self, status: str, **last: Any) -> None:
        """Send the rest, and wait for it as long as the store goes on answering.

        What is then missing is said in one line, with the command that sends it.

        Args:
            status: FINISHED, FAILED or KILLED; for a killed run nothing is waited for or said,
                since it is gone on with, and is sent then.
            last: further fields of `Tracking`, such as `artifacts`.
        """
        sender = self._sender
        sender.note(status=status, **last)
        end_s = KILLED_END_S if status == "KILLED" else self.end_s
        began_s = time.monotonic()
        self._wake.set()
        while self._thread.is_alive() and not self._is_silent(began_s, end_s):
            self._thread.join(0.05)
        self._given_up.set()
        if not sender.tracking.is_complete and status != "KILLED":
            _log.warning(
                "MLflow at %s has %d steps of this run and not its end. Nothing is lost: once it "
                "answers, `flowreel track %s` sends the rest",
                *(sender.tracking.uri, sender.steps, sender.out),
            )

    def _is_silent(self, began_s: float, end_s: float) -> bool:
        return time.monotonic() - max(began_s, self._sender.answered_s) > end_s

    def _work(self) -> None:
        in_trouble = False
        while not self._given_up.is_set():
            try:
                self._sender.send()
            except Exception as error:
                if not in_trouble:
                    _log.warning("%s", self._trouble_line(error))
                in_trouble = True
            else:
                if in_trouble:
                    _log.warning("MLflow answers again and has all %d steps", self._sender.steps)
                in_trouble = False
            if self._sender.tracking.is_complete:
                return
            if not self._wake.is_set():
                self._wake.wait(self.retry_s if in_trouble else POLL_S)
            elif in_trouble:
                self._given_up.wait(LAST_RETRY_S)

    def _trouble_line(self, error: Exception) -> str:
        return (
            f"MLflow at {self._sender.tracking.uri} does not take this run ({_first_line(error)}). "
            f"Training goes on; {self._sender.out / HISTORY_NAME} has everything and is sent when "
            "MLflow answers"
        )


def send_folder(out: Path, *, uri: str | None = None) -> Sender:
    """Send a run's folder now, in this thread; returns what was sent.

    Args:
        out: the run's folder.
        uri: another store than the run's own, which it then belongs to.

    Raises:
        TrackingError: the folder was not tracked, or the store does not answer or refuses.
    """
    tracking = Tracking.read(out)
    if tracking is None:
        raise TrackingError(
            f"{out} has no {TRACKING_NAME} of this version; give the folder of a run that trained "
            "with train.tracking.enabled"
        )
    set_deadlines()
    if uri is not None and uri != tracking.uri:
        tracking = replace(tracking, uri=uri, run_id=None)
    sender = Sender(out, replace(tracking, is_complete=False))
    try:
        sender.send()
    except Exception as error:
        raise TrackingError(
            f"MLflow at {tracking.uri} does not take {out} ({_first_line(error)}); it has "
            f"{sender.steps} steps of it, and another attempt goes on there"
        ) from error
    return sender


def add_to_record(out: Path, figures: Mapping[str, float], files: Sequence[Path] = ()) -> None:
    """Add to a finished run what was measured, and files; sent at once where the store answers.

    Where it does not, that is said in one line; they are noted, and sent with the run.

    Args:
        out: the run's folder; one that was not tracked is let be.
        figures: numbers by the names they get.
        files: what becomes artifacts, of the folder or one beside it.
    """
    tracking = Tracking.read(out)
    if tracking is None:
        return
    step = int(tracking.tags.get("steps", 0))
    line = {"step": step, "time_s": time.time(), **figures}
    names = (os.path.relpath(path, out) for path in files)
    replace(
        tracking,
        figures=(*tracking.figures, line),
        artifacts=tuple(dict.fromkeys((*tracking.artifacts, *names))),
    ).write(out)
    try:
        send_folder(out)
    except TrackingError as error:
        _log.warning("%s: `flowreel track %s`", error, out)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
