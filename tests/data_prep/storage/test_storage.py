"""A folder behaves the same on a disk and in an object store, and says so when either fails."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.sources.find import (
    find_shards,
    fingerprint,
    name_shards,
)
from data_prep.sources.listing import ShardError
from data_prep.sources.samples import read_shard
from data_prep.storage import lease
from data_prep.storage import location as locations
from data_prep.storage.folder import Folder
from data_prep.storage.location import StorageError, open_stream
from data_prep.storage.store import open_folder
from flowreel.locks import LockHeld
from tests.data_prep.s3_server import Store
from tests.places import ROOT


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, store: Store) -> Folder:
    if request.param == "disk":
        return open_folder(tmp_path / "folder")
    return open_folder(store.uri(f"{request.node.name}"))


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(locations, "_STORE_ATTEMPTS", 2)
    locations._s3.cache_clear()
    yield
    locations._s3.cache_clear()


def test_files_are_written_replaced_listed_and_removed(folder: Folder) -> None:
    assert folder.names("a") == [] == folder.folders()
    folder.write("a/b/2.txt", b"two")
    folder.write("a/b/1.txt", b"one")
    with folder.replacing("a/3.bin") as path:
        path.write_bytes(b"x" * 12_000_000)
    folder.write("a/b/1.txt", b"uno")
    assert folder.read("a/b/1.txt") == b"uno"
    assert len(folder.read("a/3.bin")) == 12_000_000
    with folder.open("a/b/2.txt") as file:
        file.seek(1)
        assert file.read() == b"wo"
    assert (folder.names("a/b"), folder.names("a")) == (["1.txt", "2.txt"], ["3.bin"])
    assert (folder.folders("a"), folder.folders()) == (["b"], ["a"])
    assert folder.exists("a/3.bin")
    assert not folder.exists("a/b")
    folder.remove("a/3.bin")
    folder.remove("a/3.bin")
    folder.remove_folder("a/b")
    folder.remove_folder("a/b")
    assert not folder.exists("a/b/1.txt")
    with pytest.raises(FileNotFoundError):
        folder.read("a/b/1.txt")
    assert pickle.loads(pickle.dumps(folder)).names("a/b") == []


def test_a_file_whose_writing_fails_is_not_there(folder: Folder) -> None:
    def write_half() -> None:
        with folder.replacing("a/f") as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert folder.names("a") == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".f.parquet.123.tmp", "f.tmp", ".hidden", "a/.g.123.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    open_folder(tmp_path).remove_partials()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".hidden", "a", "f.tmp"]


@pytest.mark.parametrize("state", ["broken", "shut"])
@pytest.mark.usefixtures("quick_retries")
def test_a_failing_store_is_a_storage_error_that_says_what_to_do(store: Store, state: str) -> None:
    folder = open_folder(store.uri(f"failing-{state}"))
    folder.write("f", b"before")
    store.gate.state = state
    try:
        for action in (
            lambda: folder.write("f", b"after"),
            lambda: folder.read("f"),
            lambda: folder.names(),
            lambda: folder.exists("f"),
            lambda: folder.remove("f"),
            lambda: fingerprint(store.uri(f"failing-{state}/f")),
        ):
            with pytest.raises(StorageError, match=r"s3://flowreel/failing.*store.*run the same"):
                action()
    finally:
        store.gate.state = "open"
    assert folder.read("f") == b"before"


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(StorageError, match=r"AWS_ACCESS_KEY_ID") as caught:
        open_folder("s3://key:secret@bucket/x").read("f")
    assert "secret@" not in str(caught.value)


def test_shards_in_a_store_are_found_named_and_streamed(
    store: Store, world: list[str], tmp_path: Path
) -> None:
    for path in world[:2]:
        store.upload(Path(path), f"found/{Path(path).name}")
    uris = find_shards(store.uri("found"))
    assert uris == [store.uri(f"found/{n:05d}.tar") for n in range(2)]
    assert find_shards(store.uri("found/{00000..00001}.tar")) == uris
    assert list(name_shards(uris)) == ["00000", "00001"]
    for uri, path in zip(uris, world, strict=False):
        assert list(read_shard(uri)) == list(read_shard(path))
    # The two are of one size and were put within a second.
    assert fingerprint(uris[0]) == fingerprint(uris[0]) != fingerprint(uris[1])
    with pytest.raises(ShardError, match="no such file"):
        fingerprint(store.uri("found/9.tar"))
    with pytest.raises(ShardError, match=r"no \*.tar in s3://flowreel/nothing"):
        find_shards(store.uri("nothing"))


@pytest.mark.usefixtures("quick_retries")
def test_a_store_that_fails_within_a_shard_is_not_a_truncated_shard(
    store: Store, world: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "READ_AHEAD_BYTES", 4096)
    samples = read_shard(store.upload(Path(world[0]), "cut.tar"))
    next(samples)
    store.gate.state = "broken"
    try:
        with pytest.raises(StorageError, match=r"cannot read s3://flowreel/cut\.tar"):
            list(samples)
    finally:
        store.gate.state = "open"


def test_a_stream_holds_only_a_part_of_a_store_s_file(store: Store, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(40_000_000))
    with open_stream(store.upload(big, "big")) as stream:
        before = _resident_bytes()
        total = 0
        while data := stream.read(1 << 20):
            total += len(data)
        grown = _resident_bytes() - before
    assert total == 40_000_000
    assert grown < 3 * locations.READ_AHEAD_BYTES


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.5)
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "_SAFE_S", 1.0)


@pytest.mark.usefixtures("quick_lease")
def test_a_store_s_lock_has_one_holder_however_many_come_at_once(store: Store) -> None:
    inside, most, finished = 0, 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal inside, most, finished
        with open_folder(store.uri("locked")).lock("lock", wait_s=60):
            with counting:
                inside, most = inside + 1, max(most, inside + 1)
            time.sleep(0.3)
            with counting:
                inside, finished = inside - 1, finished + 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, finished) == (1, 3)
    assert store.files("locked") == {}


@pytest.mark.usefixtures("quick_lease")
def test_a_held_lock_in_a_store_is_refused(store: Store) -> None:
    folder = open_folder(store.uri("held"))
    with folder.lock("lock") as check:
        time.sleep(0.5)
        with pytest.raises(LockHeld), open_folder(store.uri("held")).lock("lock"):
            pass
        check()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(store: Store) -> None:
    script = (
        "import sys, time\nfrom data_prep.storage.store import open_folder\n"
        "with open_folder(sys.argv[1]).lock('lock'):\n    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", script, store.uri("killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        other.kill()
    begun = time.monotonic()
    with open_folder(store.uri("killed")).lock("lock"):
        assert time.monotonic() - begun < lease.LEASE_S / 2
    assert store.files("killed") == {}


@pytest.mark.usefixtures("quick_lease")
def test_a_lease_of_another_machine_ends_when_it_is_not_renewed(store: Store) -> None:
    folder = open_folder(store.uri("afar"))
    holder = {"host": "x", "machine": "afar", "pid": "1", "started": "1", "beat": "107"}
    folder.write("lock/other.json", json.dumps(holder).encode())
    begun = time.monotonic()
    with folder.lock("lock"):
        assert time.monotonic() - begun > lease.LEASE_S
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.2):
            holder["beat"] = str(int(holder["beat"]) + 1)
            folder.write("lock/other.json", json.dumps(holder).encode())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        time.sleep(0.5)
        with pytest.raises(LockHeld), folder.lock("lock"):
            pass
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("quick_lease")
def test_a_holder_that_lost_its_lease_is_told(store: Store) -> None:
    folder = open_folder(store.uri("lost"))
    check: Callable[[], None]
    with folder.lock("lock") as check:
        check()
        for base in folder.names("lock"):
            folder.remove(f"lock/{base}")
        time.sleep(1.0)
        with pytest.raises(LockHeld):
            check()
        assert store.files("lost") == {}
