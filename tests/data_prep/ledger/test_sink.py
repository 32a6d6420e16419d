"""Blocks, threads, repeats, several sinks: always the bytes of one that takes row by row."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.sinks import block_of, counted_store, job_of, requests_of_shards
from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.records import write_groups
from data_prep.ledger.errors import OutputBusy
from data_prep.ledger.locks import lock_output, lock_writing
from data_prep.ledger.sink import SinkStage, sink_of
from data_prep.ledger.staging import STAGED_SCHEMA, Staging
from data_prep.row import Row, buffers_of, join_windows, rows_of, table_of
from data_prep.storage import folder as folders
from data_prep.storage.folder import LocalFolder
from data_prep.storage.store import open_folder
from flowreel.locks import LockHeld
from flowreel.values import sha256_of
from tests.data_prep.in_process import digests
from tests.data_prep.s3_server import Store

CONFIG = PrepareConfig(bucket=BucketConfig(num_frames=5, height=16, width=16))
SHAPE, FRAMES = (2, 4, 32, 32), (5, 16, 16)
SHARDS = ("00000", "00001", "00002")
CLIPS = 9


def moments(seed: int) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(seed)
    mean, logvar = rng.standard_normal((2, *SHAPE)).astype("<f2")
    return mean.tobytes(), logvar.tobytes()


def rows_of_shard(shard: str) -> list[Row]:
    """Clips of one window, clips of two, a clip that was dropped, and the shard's end."""
    rows: list[Row] = []
    for number in range(CLIPS):
        seed = 100 * SHARDS.index(shard) + number
        block = block_of(shard, [number], moments(seed), SHAPE, FRAMES)
        row = rows_of(block)[0]
        # Keys and numbers in different orders.
        row["key"] = f"{(number * 7) % CLIPS:03d}"
        if number == 4:
            row |= {"status": "dropped", "reason": "black_frames", "mean": None, "logvar": None}
        if number % 3 == 2:
            mean, logvar = moments(seed + 50)
            row = join_windows([row, {**row, "window": 1, "mean": mean, "logvar": logvar}])
        rows.append(row)
    (closing,) = block_of(shard, [], moments(0), closing=CLIPS).to_pylist()
    return [*rows, closing]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row for shard in SHARDS for row in rows_of_shard(shard)]


@pytest.fixture(scope="module")
def whole(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one sink makes of the rows, one by one and in order."""
    out = tmp_path_factory.mktemp("whole")
    stage = sink(out)
    assert {name for row in rows for name in stage.accept(table_of([row]))} == set(SHARDS)
    return digests(out)


def sink(out: Path, names: Sequence[str] = SHARDS) -> SinkStage:
    return SinkStage(CONFIG, str(out), [job_of(name) for name in names])


def in_blocks(rows: Sequence[Row], rng: random.Random) -> Iterator[pa.Table]:
    """Blocks of one to six rows."""
    rest = list(rows)
    while rest:
        count = rng.randint(1, 6)
        yield table_of(rest[:count])
        del rest[:count]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_in_any_order_with_repeats_give_the_bytes_of_single_rows(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    arriving = [*rows, *rng.sample(rows, 8)]
    rng.shuffle(arriving)
    stage = sink(tmp_path)
    completed = [name for block in in_blocks(arriving, rng) for name in stage.accept(block)]
    assert sorted(completed) == list(SHARDS)
    assert digests(tmp_path) == whole


@pytest.mark.parametrize("sinks", [2, 3])
def test_several_sinks_called_by_several_threads_write_what_one_does(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, sinks: int
) -> None:
    rng = random.Random(sinks)
    parts = [[name for name in SHARDS if sink_of(name, sinks) == n] for n in range(sinks)]
    stages = [sink(tmp_path, names) for names in parts]
    arriving = [*rows, *rng.sample(rows, 12)]
    rng.shuffle(arriving)
    own = [[row for row in arriving if row["shard"] in names] for names in parts]
    calls = [(s, b) for s, part in zip(stages, own, strict=True) for b in in_blocks(part, rng)]
    rng.shuffle(calls)
    with ThreadPoolExecutor(8) as pool:
        completed = list(pool.map(lambda call: call[0].accept(call[1]), calls))
    assert sorted(name for names in completed for name in names) == list(SHARDS)
    assert digests(tmp_path) == whole


@pytest.mark.parametrize("stop", range(1, 9, 2))
def test_a_sink_that_is_gone_is_taken_up_by_another_that_skips_what_is_staged(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, stop: int
) -> None:
    rng = random.Random(stop)
    arriving = rng.sample(rows, len(rows))
    blocks = list(in_blocks(arriving, rng))
    first = sink(tmp_path)
    for block in blocks[:stop]:
        first.accept(block)
    staging = Staging(open_folder(tmp_path))
    manifests = {path.stem for path in tmp_path.glob("manifests/*.json")}
    taken = {
        (row["shard"], row["number"])
        for block in blocks[:stop]
        for row in block.to_pylist()
        if row["number"] >= 0 and row["shard"] not in manifests
    }
    staged = {(name, n) for name in SHARDS for n in staging.numbers(job_of(name))}
    assert staged == taken
    second = sink(tmp_path)
    # As the reader does: what is staged does not come again, and the shard's end always does.
    left = [row for row in rows if (row["shard"], row["number"]) not in staged]
    for block in in_blocks(rng.sample(left, len(left)), rng):
        second.accept(block)
    assert digests(tmp_path) == whole


def test_what_a_block_completes_is_not_staged_first(
    rows: list[Row], whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise AssertionError("staged")

    monkeypatch.setattr(Staging, "write", write)
    monkeypatch.setattr(Staging, "end", write)
    assert sink(tmp_path).accept(table_of(rows)) == set(SHARDS)
    assert digests(tmp_path) == whole


def test_moments_are_staged_from_the_block_s_own_memory(rows: list[Row], tmp_path: Path) -> None:
    block = table_of([row for row in rows if row["shard"] == SHARDS[0]][:4])
    table = sink(tmp_path)._staged(job_of(SHARDS[0]), block, range(4))
    assert table["number"].to_pylist() == [0, 1, 2, 2, 3]
    for column in ("mean", "logvar"):
        own = buffers_of(block[column])
        packed = buffers_of(pa.chunked_array([block["windows"][2].values]))
        sources = [own[0], own[1], packed[0], packed[1], own[3]]
        for staged, source in zip(buffers_of(table[column]), sources, strict=True):
            assert staged is not None
            assert source is not None
            assert source.address <= staged.address < source.address + source.size


def test_shards_of_one_size_and_time_do_not_mix(tmp_path: Path) -> None:
    """Such jobs have one digest: of two clips of either shard, none counts for the other."""
    assert job_of("a").digest == job_of("b").digest
    stage = sink(tmp_path, ["a", "b"])
    for name, seed in (("a", 1), ("b", 2)):
        assert not stage.accept(block_of(name, [0], moments(seed), SHAPE, FRAMES))
    for name, seed in (("b", 2), ("a", 1)):
        block = block_of(name, [1], moments(seed), SHAPE, FRAMES, closing=2)
        assert stage.accept(block) == {name}
    for name, seed in (("a", 1), ("b", 2)):
        table = pq.read_table(tmp_path / "latents" / f"{name}.5x16x16.parquet")
        assert table["mean"].to_pylist() == [moments(seed)[0]] * 2


def test_scattered_numbers_are_told_by_the_names_of_several_files(tmp_path: Path) -> None:
    staging, job = Staging(open_folder(tmp_path)), job_of("a")
    numbers = [number for number in range(0, 200, 3) for _ in range(2)]
    empty = {"key": "k", "shard": "a", "status": "failed", "reason": "", "detail": ""}
    rows = [{**empty, "number": number} for number in numbers]
    staging.put(job, pa.Table.from_pylist(rows, STAGED_SCHEMA))
    again = Staging(open_folder(tmp_path))
    assert again.numbers(job) == set(numbers) == again.samples(job).keys()
    assert all(len(sample.rows) == 2 for sample in again.samples(job).values())
    names = [path.name for path in tmp_path.glob("staging/a/*/*")]
    assert len(names) > 1
    assert max(map(len, names)) < 200


def test_the_digest_that_follows_a_file_is_that_of_the_file(tmp_path: Path) -> None:
    block = block_of("a", range(40), moments(0), SHAPE, FRAMES)
    schema = pa.schema([block.schema.field(name) for name in ("key", "mean", "logvar")])
    groups = [block.select(schema.names).slice(at, 7) for at in range(0, 40, 7)]
    count, digest = write_groups(tmp_path / "f", groups, schema)
    assert (count, digest) == (40, sha256_of(tmp_path / "f"))
    metadata = pq.ParquetFile(tmp_path / "f").metadata
    assert metadata.num_row_groups == len(groups)
    assert metadata.row_group(0).column(1).compression == "UNCOMPRESSED"


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_the_writers_of_one_run_write_together_and_a_late_one_of_another_does_not(
    store: Store, tmp_path: Path, kind: str
) -> None:
    def folder() -> folders.Folder:
        return open_folder(store.uri("writers") if kind == "store" else str(tmp_path))

    with lock_writing(folder(), "new") as one, lock_writing(folder(), "new") as two:
        one()
        two()
        for group in ("old", ""):
            with pytest.raises(LockHeld), folder().lock(".lock-writer", group=group):
                pass
    with folder().lock(".lock-writer", group="old"):
        pass


def test_a_new_run_waits_for_every_writer_of_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.ledger.locks._DYING_S", 0.0)
    folder = LocalFolder(tmp_path)
    with lock_writing(folder, "old"):
        with lock_writing(folder, "old"):
            pass
        # One of two has gone.
        with pytest.raises(OutputBusy, match="the writer of another run"), lock_output(folder):
            pass
    with lock_output(folder):
        pass


def test_every_tiny_shard_costs_a_store_the_same_requests(tmp_path: Path) -> None:
    with counted_store(tmp_path) as (out, log):
        few = requests_of_shards(3, out, log)
        many = requests_of_shards(9, out, log, first=3)
    for requests in (few, many):
        del requests["seconds"]
    assert many == {kind: 3 * count for kind, count in few.items()}
    # Status, latents, captions and the manifest; before them, looks for an earlier manifest, by
    # itself and among the folded ones.
    assert few == {"HEAD": 2 * 3, "PUT": 4 * 3}
