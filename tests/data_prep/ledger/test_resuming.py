"""Killed at any write, or stopped by a full disk or a failing store: the bytes are the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.latents.index_file import INDEX_NAME
from data_prep.ledger.errors import OutputBusy
from data_prep.ledger.locks import lock_output, lock_writing
from data_prep.ledger.sink import SinkStage
from data_prep.row import Row, table_of
from data_prep.run import plan_run, shards_left
from data_prep.storage import location as locations
from data_prep.storage.location import StorageError
from data_prep.storage.store import open_folder
from tests.data_prep.in_process import (
    digests,
    finished_rows,
    prepare_locally,
)
from tests.data_prep.s3_server import Store
from tests.places import ROOT


class Killed(BaseException):
    """The process is no more."""


@dataclass
class Undertaker:
    """Ends the process, as it were, at the n-th thing that it does to a disk, without clean-up."""

    patch: pytest.MonkeyPatch
    operations: int = 1 << 30
    """How many are left to live for."""

    def __post_init__(self) -> None:
        for owner, name in ((os, "replace"), (Path, "unlink"), (shutil, "rmtree"), (os, "fsync")):
            self.patch.setattr(owner, name, self._mortal(getattr(owner, name)))

    def _mortal(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.operations -= 1
            if self.operations <= 0:
                raise Killed
            return function(*args, **kwargs)

        return call


def made_rows(config: PrepareConfig, shards: list[str], codec: Path, out: Path) -> list[Row]:
    return list(finished_rows(plan_run(config, shards, out, str(codec)), config))


def sink_all(
    config: PrepareConfig, shards: list[str], codec: Path, out: Path, rows: list[Row]
) -> int:
    """A run whose samples are made already; how many of them it still took."""
    folder = open_folder(out)
    with lock_output(folder):
        plan = plan_run(config, shards, out, str(codec))
        with lock_writing(folder) as still_ours:
            sink = SinkStage(config, plan.out, plan.jobs, still_ours)
            staged = {job.name: sink.staging.numbers(job) for job in plan.jobs}
            missing = [
                row
                for row in rows
                if row["shard"] in staged and row["number"] not in staged[row["shard"]]
            ]
            for row in missing:
                sink.accept(table_of([row]))
    return sum(row["number"] >= 0 for row in missing)


def assert_manifests_are_true(out: Path) -> None:
    """Every file that a manifest names is there with the content that it names."""
    for path in (out / "manifests").glob("*.json"):
        for entry in json.loads(path.read_text())["files"]:
            content = (out / entry["path"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("changed", [False, True], ids=["new", "changed"])
def test_killed_at_any_write_and_run_again_gives_the_same_bytes(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path, changed: bool
) -> None:
    """`changed`: the output holds what another content of the shard, of another bucket, made."""
    shard = tmp_path / "in" / "one.tar"
    shard.parent.mkdir()
    shutil.copy(world[0], shard)
    before = tmp_path / "before"
    if changed:
        prepare_locally(config, [str(shard)], before, codec_dir)
        # What is made of all shards together is not tested here.
        (before / INDEX_NAME).unlink()
        shutil.copy(world[-1], shard)
    shards = [str(shard), world[1]]
    rows = made_rows(config, shards, codec_dir, tmp_path / "scratch")
    whole = tmp_path / "whole"
    sink_all(config, shards, codec_dir, whole, rows)
    points = 0
    while True:
        out = tmp_path / f"out{points}"
        if changed:
            shutil.copytree(before, out)
        else:
            # The codec is loaded for a new output only: copied, as it is not what is tested.
            out.mkdir()
            shutil.copy(whole / "dataset.json", out)
        with pytest.MonkeyPatch.context() as patch:
            undertaker = Undertaker(patch, operations=points + 1)
            try:
                sink_all(config, shards, codec_dir, out, rows)
            except Killed:
                undertaker.operations = 1 << 30
            else:
                break
        assert_manifests_are_true(out)
        count = _finished_count(out, _fingerprints(whole))
        taken = sink_all(config, shards, codec_dir, out, rows)
        assert digests(out) == digests(whole), f"killed at disk operation {points + 1}"
        assert not list(out.glob("staging/*"))
        assert taken == len(rows) - 2 - count
        shutil.rmtree(out)
        points += 1
    assert points > 40


def _finished_count(out: Path, fingerprints: set[str]) -> int:
    """Samples of these contents that are staged, or in a shard whose manifest stands."""
    manifests = [json.loads(path.read_text()) for path in out.glob("manifests/*.json")]
    counts = {m["shard"]: m["counts"] for m in manifests if m["fingerprint"] in fingerprints}
    staged = [p for p in out.glob("staging/*/*/*.arrow") if p.parts[-3] not in counts]
    return len(staged) + sum(sum(by_status.values()) for by_status in counts.values())


def _fingerprints(out: Path) -> set[str]:
    return {json.loads(p.read_text())["fingerprint"] for p in out.glob("manifests/*.json")}


def test_a_second_run_neither_waits_nor_writes(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    with lock_output(open_folder(tmp_path)):
        with pytest.raises(OutputBusy, match="another run is writing"):
            prepare_locally(config, world, tmp_path, codec_dir)
        assert shards_left(config, world, tmp_path, str(codec_dir)) == 3
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".lock")] == []


FULL_DISK = """
import sys
from pathlib import Path
from data_prep.config import PrepareConfig
from data_prep.latents.index_file import INDEX_NAME
from data_prep.storage.location import StorageError
from tests.data_prep.in_process import prepare_locally
config = PrepareConfig.model_validate_json(sys.argv[1])
if sys.argv[4] == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)
try:
    prepare_locally(config, sys.argv[6:], Path(sys.argv[2]), Path(sys.argv[3]))
except StorageError as error:
    print(error)
    sys.exit(3)
"""


def _run_full(mode: str, size: int, config: PrepareConfig, *arguments: str) -> tuple[int, str]:
    out, codec, *shards = arguments
    command = [sys.executable, "-c", FULL_DISK, config.model_dump_json(), out, codec, mode]
    command += [str(size), *shards]
    if mode == "disk":
        inner = (
            'size=$1 out=$2 keep=$3; shift 3; mount -t tmpfs -o size=$size none "$out" || exit 99; '
            'cp -a "$keep"/. "$out"; "$@"; code=$?; find "$keep" -mindepth 1 -delete; '
            'cp -a "$out"/. "$keep"; exit $code'
        )
        keep = f"{out}-kept"
        Path(keep).mkdir(exist_ok=True)
        wrap = ["unshare", "--map-root-user", "--mount", "sh", "-c", inner, "sh"]
        command = [*wrap, str(size), out, keep, *command]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode in (0, 3), run.stderr
    return run.returncode, run.stdout


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("mode", ["disk", "limit"])
@pytest.mark.slow
def test_a_full_disk_stops_with_a_word_and_goes_on_when_there_is_room(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path, mode: str
) -> None:
    """A file system of 64 KiB; or a limit on a file's size that lets samples pass, not shards."""
    if mode == "disk" and not _may_mount():
        pytest.skip("no right to mount a file system here")
    bucket = BucketConfig(num_frames=5, height=128, width=128, fps=8.0)
    config = config.model_copy(update={"bucket": bucket})
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_locally(config, world, whole, codec_dir)
    out.mkdir()
    small, large = (64 << 10, 64 << 20) if mode == "disk" else (9000, 64 << 20)
    code, message = _run_full(mode, small, config, str(out), str(codec_dir), *world)
    assert code == 3
    words = "No space left on device" if mode == "disk" else "File too large"
    assert words in message
    assert "free some space, then run the same command again: what is finished is kept" in message
    kept = out if mode == "limit" else Path(f"{out}-kept")
    assert list(kept.glob("staging/*/*/*.arrow")) or list(kept.glob("manifests/*.json"))
    assert not list(kept.rglob("*.tmp"))
    assert_manifests_are_true(kept)
    code, _ = _run_full(mode, large, config, str(out), str(codec_dir), *world)
    assert code == 0
    assert digests(kept) == digests(whole)


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(locations, "_STORE_ATTEMPTS", 2)
    locations._s3.cache_clear()
    yield
    locations._s3.cache_clear()


def downloaded(store: Store, name: str, folder: Path) -> Path:
    for path, content in store.files(name).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("no_patience")
def test_a_store_holds_what_a_disk_holds_though_it_failed_on_the_way(
    config: PrepareConfig,
    world: list[str],
    codec_dir: Path,
    tmp_path: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = [store.upload(Path(path), f"in/{Path(path).name}") for path in world]
    whole = tmp_path / "whole"
    prepare_locally(config, shards, whole, codec_dir)
    out = store.uri("out")
    accept, taken = SinkStage.accept, 0

    def fail_at(number: int, state: str) -> None:
        def accept_until(self: SinkStage, block: pa.Table) -> set[str]:
            nonlocal taken
            taken += 1
            if taken == number:
                store.gate.state = state
            return accept(self, block)

        monkeypatch.setattr(SinkStage, "accept", accept_until)

    for number, state in ((3, "broken"), (9, "shut")):
        fail_at(number, state)
        try:
            with pytest.raises(StorageError, match="run the same command again"):
                prepare_locally(config, shards, out, codec_dir)
        finally:
            store.gate.state = "open"
        assert taken == number
    report = prepare_locally(config, shards, out, codec_dir)
    assert report.counts == {"kept": 11}
    # 2 samples before the first failure and 5 between it and the second (which asked for 6 more).
    assert report.samples_now <= 14 - 2 - 5
    assert digests(downloaded(store, "out", tmp_path / "got")) == digests(whole)
    assert not any(name.startswith((".lock", "staging")) for name in store.files("out"))
    local, remote = LatentDataset(whole, "all"), LatentDataset(out, "all")
    assert remote.buckets == local.buckets
    for ids in local.buckets.values():
        a, b = local.load(ids), remote.load(ids)
        assert a.mean_BTCHW.equal(b.mean_BTCHW)
        assert a.logvar_BTCHW.equal(b.logvar_BTCHW)
        assert (a.captions, a.synthetic) == (b.captions, b.synthetic)
    assert prepare_locally(config, shards, out, codec_dir).shards_now == 0
    store.upload(Path(world[-1]), "in/00000.tar")
    report = prepare_locally(config, shards, out, codec_dir)
    assert (report.shards_now, report.total) == (1, 10)
    assert not any(name.startswith("latents/00000.5x") for name in store.files("out"))


def test_of_a_store_s_dataset_only_the_row_groups_asked_for_are_read(
    store: Store, tmp_path: Path
) -> None:
    from tests.data_prep.latents.test_dataset import write_dataset

    write_dataset(tmp_path, count=200, side=64)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            store.upload(path, f"read/{path.relative_to(tmp_path)}")
    dataset = LatentDataset(store.uri("read"), "all")
    ids = dataset.buckets[next(iter(dataset.buckets))]
    sent = store.gate.sent_bytes
    dataset.load([ids[0]])
    once = store.gate.sent_bytes - sent
    dataset.load([ids[1]])
    # The second record is in the row group that the first came in.
    assert store.gate.sent_bytes - sent == once
    assert once < 0.3 * min(p.stat().st_size for p in (tmp_path / "latents").iterdir())
