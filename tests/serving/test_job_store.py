"""The job store: order, races, restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.job_store import INTERRUPTED, JobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path)
    yield store
    store.close()


def test_a_job_goes_from_queued_to_completed(store: JobStore) -> None:
    store.create("a", "tiny", {"prompt": "p"})
    assert store.start("a")
    store.progress("a", 40)
    assert store.require("a").progress == 40
    assert store.complete("a")
    job = store.require("a")
    assert (job.status, job.progress, job.request) == ("completed", 100, {"prompt": "p"})
    assert job.created_at <= job.started_at <= job.completed_at  # type: ignore[operator]


def test_of_a_cancel_and_a_finish_only_the_first_wins(store: JobStore) -> None:
    store.create("a", "tiny", {})
    store.start("a")
    assert store.cancel("a")
    assert not store.complete("a")
    assert not store.fail("a", "code", "message")
    assert store.require("a").status == "cancelled"


def test_pages_follow_one_another_in_both_orders(store: JobStore) -> None:
    for name in "abcde":
        store.create(name, "tiny", {})
    newest, more = store.page(limit=2)
    assert ([job.id for job in newest], more) == (["e", "d"], True)
    rest, more = store.page(limit=5, after="d")
    assert ([job.id for job in rest], more) == (["c", "b", "a"], False)
    oldest, _ = store.page(limit=2, after="a", newest_first=False)
    assert [job.id for job in oldest] == ["b", "c"]


def test_after_a_restart_what_ran_has_failed_and_what_waited_still_waits(tmp_path: Path) -> None:
    first = JobStore(tmp_path)
    for name in "abc":
        first.create(name, "tiny", {})
    first.start("a")
    first.close()
    again = JobStore(tmp_path)
    assert [job.id for job in again.recover()] == ["b", "c"]
    job = again.require("a")
    assert (job.status, job.error_code, job.error_message) == ("failed", "interrupted", INTERRUPTED)
    again.close()


def test_a_removed_job_leaves_no_files(store: JobStore) -> None:
    job = store.create("a", "tiny", {})
    (job.folder / "video.mp4").write_bytes(b"x")
    store.remove("a")
    assert store.get("a") is None
    assert not job.folder.exists()
