"""The durable list of videos asked for: one SQLite row each, their files in a folder each.

A row goes queued → in_progress → completed | failed | cancelled. One process owns a store. When the
store is opened again, a video that was in progress as that process died is marked failed, and those
that were still queued are handed back to be run. Knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
    update,
)

from serving.errors import VideoInterrupted

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")
INTERRUPTED = "The service stopped while this video was being made; ask for it again."
"""What a client reads of a video that was in progress when the service stopped."""

_METADATA = MetaData()
_JOBS = Table(
    "jobs",
    _METADATA,
    # The row number keeps the order of arrival where two share a time stamp.
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String, unique=True, nullable=False),
    Column("status", String, nullable=False, index=True),
    Column("model", String, nullable=False),
    Column("request", String, nullable=False),
    Column("progress", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("completed_at", Float),
    Column("error_code", String),
    Column("error_message", String),
)


@dataclass(frozen=True)
class Job:
    """One row.

    Times are Unix seconds, `progress` is 0 to 100, `request` holds a `Generation` as a dict, and
    `folder` is where the video's files lie.
    """

    id: str
    status: Status
    model: str
    request: dict[str, Any]
    progress: float
    created_at: float
    started_at: float | None
    completed_at: float | None
    error_code: str | None
    error_message: str | None
    folder: Path


class JobStore:
    """Jobs under one data folder: `jobs.sqlite` and `videos/ID/`.

    Calls are short and may come from any thread.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = JobStore(Path(folder))
    ...     job = store.create("video_1", "tiny", {"prompt": "a red square"})
    ...     moves = store.start(job.id), store.complete(job.id), store.cancel(job.id)
    ...     status = store.require(job.id).status
    ...     store.close()
    >>> moves, status
    ((True, True, False), 'completed')
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        (self.data_dir / "videos").mkdir(parents=True, exist_ok=True)
        self._engine: Engine = create_engine(f"sqlite:///{self.data_dir / 'jobs.sqlite'}")
        event.listen(self._engine, "connect", _set_pragmas)
        _METADATA.create_all(self._engine)

    def close(self) -> None:
        """Let go of the database file."""
        self._engine.dispose()

    def create(self, job_id: str, model: str, request: dict[str, Any]) -> Job:
        """A new queued job and its folder."""
        self.folder(job_id).mkdir()
        row = {
            "id": job_id,
            "status": "queued",
            "model": model,
            "request": json.dumps(request),
            "progress": 0.0,
            "created_at": time.time(),
        }
        with self._engine.begin() as connection:
            connection.execute(insert(_JOBS).values(row))
        return self.require(job_id)

    def folder(self, job_id: str) -> Path:
        """Where a job's files lie."""
        return self.data_dir / "videos" / job_id

    def get(self, job_id: str) -> Job | None:
        """The job, or None where there is none of this id."""
        with self._engine.connect() as connection:
            row = connection.execute(select(_JOBS).where(_JOBS.c.id == job_id)).mappings().first()
        return None if row is None else self._job(row)

    def require(self, job_id: str) -> Job:
        """The job, which must exist."""
        job = self.get(job_id)
        assert job is not None, f"job {job_id} vanished"
        return job

    def page(
        self, *, limit: int = 20, after: str | None = None, newest_first: bool = True
    ) -> tuple[list[Job], bool]:
        """A page of jobs after the one named, and whether more follow."""
        # One row more than is wanted tells whether more follow, without counting them all.
        order = _JOBS.c.number.desc() if newest_first else _JOBS.c.number.asc()
        query = select(_JOBS).order_by(order).limit(limit + 1)
        if after is not None:
            last = select(_JOBS.c.number).where(_JOBS.c.id == after).scalar_subquery()
            query = query.where(_JOBS.c.number < last if newest_first else _JOBS.c.number > last)
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [self._job(row) for row in rows[:limit]], len(rows) > limit

    def start(self, job_id: str) -> bool:
        """Move queued → in_progress; False where it was no longer queued."""
        return self._move(job_id, ("queued",), status="in_progress", started_at=time.time())

    def progress(self, job_id: str, percent: float) -> None:
        """Note how much of a running job is made, 0 to 100."""
        self._move(job_id, ("in_progress",), progress=percent)

    def complete(self, job_id: str) -> bool:
        """Move in_progress → completed; False where it was no longer in progress."""
        return self._move(
            job_id,
            ("in_progress",),
            status="completed",
            progress=100.0,
            completed_at=time.time(),
        )

    def fail(self, job_id: str, code: str, message: str) -> bool:
        """Move an unfinished job to failed, with the code and message of a `ServingError`.

        False where it had already finished.
        """
        return self._move(
            job_id,
            UNFINISHED,
            status="failed",
            completed_at=time.time(),
            error_code=code,
            error_message=message,
        )

    def cancel(self, job_id: str) -> bool:
        """Move an unfinished job to cancelled; False where it had already finished."""
        return self._move(job_id, UNFINISHED, status="cancelled", completed_at=time.time())

    def remove(self, job_id: str) -> None:
        """Forget a job and delete its files."""
        job = self.get(job_id)
        if job is None:
            return
        with self._engine.begin() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.id == job_id))
        shutil.rmtree(job.folder, ignore_errors=True)

    def recover(self) -> list[Job]:
        """After a restart, fail what was in progress and return what is still queued.

        The oldest comes first.
        """
        with self._engine.begin() as connection:
            connection.execute(
                update(_JOBS)
                .where(_JOBS.c.status == "in_progress")
                .values(
                    status="failed",
                    completed_at=time.time(),
                    error_code=VideoInterrupted.code,
                    error_message=INTERRUPTED,
                )
            )
            rows = connection.execute(
                select(_JOBS).where(_JOBS.c.status == "queued").order_by(_JOBS.c.number)
            )
            return [self._job(row) for row in rows.mappings()]

    def _job(self, row: RowMapping) -> Job:
        values = dict(row)
        del values["number"]
        values["request"] = json.loads(values["request"])
        return Job(**values, folder=self.folder(values["id"]))

    def _move(self, job_id: str, allowed: tuple[Status, ...], **values: Any) -> bool:
        # Compare-and-set in one statement: a cancel and a finish that race cannot both win.
        statement = update(_JOBS).where(_JOBS.c.id == job_id, _JOBS.c.status.in_(allowed))
        with self._engine.begin() as connection:
            return connection.execute(statement.values(**values)).rowcount == 1


def _set_pragmas(connection: Any, _record: Any) -> None:
    """Settings that SQLite keeps per connection; called for each new one of the pool."""
    cursor = connection.cursor()
    # With a write-ahead log, readers (a client's polling) never wait for the writer.
    cursor.execute("PRAGMA journal_mode=WAL")
    # Two threads that write at one time take turns instead of failing at once.
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.close()
