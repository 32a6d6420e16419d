"""Twenty real kills, of actors, drivers and whole clusters, at any time; then the same bytes.

Damaged clips are among the inputs, and several sinks write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from data_prep.config import ConcurrencyConfig, PrepareConfig
from data_prep.ledger.staging import numbers_in
from data_prep.sources.samples import write_shard
from data_prep.world.shards import write_world
from tests.data_prep.bad_media import moving, sample, video
from tests.data_prep.in_process import digests, prepare_locally
from tests.data_prep.ray_cluster import RAY_ENVIRONMENT
from tests.places import ROOT

SEED = 20
CLIPS, IMAGES, PER_SHARD, DAMAGED = 96, 24, 15, 8
RUNS = [("actor", "driver")] * 5 + [("driver",)] * 3 + [("actor", "cluster")] * 2
RUNS += [("cluster",)] * 3
"""What is killed in each run of the command, in this order: twenty kills."""

DRIVER = """
import os, sys
from pathlib import Path
import ray

log, address = Path(sys.argv[4]), sys.argv[5]

def watch():
    # In every worker: say who does what, and take a little longer, so that there is time to kill.
    import time
    from data_prep.captions.stage import CaptionStage
    from data_prep.clips.decode import DecodeStage
    from data_prep.latents.encode import EncodeStage
    from data_prep.ledger.on_ray import Sink
    from data_prep.ledger.sink import SinkStage
    from data_prep.sources import on_ray

    def write(name, line):
        with open(log / name, "a") as file:
            file.write(line + "\\n")

    encode = EncodeStage.process
    def process(self, row):
        write("encodes", f"{row['shard']}/{row['number']}")
        time.sleep(0.1)
        return encode(self, row)
    EncodeStage.process = process

    def named(owner, name, stage):
        before = getattr(owner, name)
        def call(*args, **kwargs):
            write("pids", f"{stage} {os.getpid()}")
            return before(*args, **kwargs)
        setattr(owner, name, call)
    for stage in (DecodeStage, CaptionStage, EncodeStage, SinkStage, Sink):
        named(stage, "__init__", stage.__name__)
    named(on_ray, "read_rows", "read")

environment = {"worker_process_setup_hook": watch}
options = {"address": address} if address else {"num_cpus": 2, "object_store_memory": 150 * 2**20}
options |= {"include_dashboard": None if address else False, "log_to_driver": False}
ray.init(runtime_env=environment, **options)
from data_prep.config import PrepareConfig
from data_prep.on_ray import prepare
config = PrepareConfig.model_validate_json(sys.argv[1])
prepare(config, sys.argv[6:], Path(sys.argv[2]), Path(sys.argv[3]))
"""


@dataclass
class Watched:
    """The output of a command and what its workers say they do."""

    out: Path
    log: Path
    command: list[str]
    shards: list[str]

    def start(self, address: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        with (self.log / "errors").open("ab") as errors:
            return subprocess.Popen(
                [*self.command, str(self.log), address, *self.shards],
                cwd=ROOT,
                env=environment,
                stderr=errors,
            )

    def lines(self, name: str) -> list[str]:
        path = self.log / name
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def staged(self) -> list[Path]:
        """Files of finished samples of shards that are not committed."""
        while True:
            try:
                paths = self.out.glob("staging/*/*/*.arrow")
                return [path for path in paths if not path.name.startswith(".")]
            except FileNotFoundError:  # a shard was committed while its folder was listed
                continue

    def finished(self) -> set[str]:
        """SHARD/NUMBER of every sample that is staged or in a shard whose manifest stands."""
        names = set()
        for path in self.staged():
            names |= {f"{path.parts[-3]}/{number}" for number in numbers_in(path.name)}
        for path in self.out.glob("manifests/*.json"):
            manifest = json.loads(path.read_text())
            names |= {f"{manifest['shard']}/{n}" for n in range(manifest["num_samples"])}
        return names

    def unfinished_shards(self) -> set[str]:
        """Shards with staged samples and no manifest."""
        staged = {path.parts[-3] for path in self.staged()}
        return staged - {path.stem for path in self.out.glob("manifests/*.json")}

    def living(self, stage: str) -> list[psutil.Process]:
        """Processes of a stage that are there, the youngest last."""
        pids = [int(line.split()[1]) for line in self.lines("pids") if line.split()[0] == stage]
        processes = []
        for pid in dict.fromkeys(pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.name().startswith(("ray", "python")):
                    processes.append(process)
        return processes


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all below it, at once."""
    top = psutil.Process(pid)
    processes = [top, *top.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            # What has stopped starts nothing new.
            process.send_signal(signal.SIGSTOP)
    with contextlib.suppress(psutil.NoSuchProcess):
        processes += [p for p in top.children(recursive=True) if p not in processes]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that outlives the drivers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        context = ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=150 * 2**20,
        )
        yield str(context.address_info["gcs_address"])
        ray.shutdown()


def wait_for(watched: Watched, driver: subprocess.Popen[bytes], target: float) -> None:
    """Until `target` samples are finished; its fraction waits that share of a sample's time."""
    deadline = time.monotonic() + 180
    while len(watched.finished()) < int(target):
        assert driver.poll() is None, (watched.log / "errors").read_text()[-3000:]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
    time.sleep(0.12 * (target % 1))


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_twenty_kills_leave_the_bytes_of_an_uninterrupted_run(
    address: str, config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    paths = write_world(tmp_path / "in", CLIPS, IMAGES, clips_per_shard=PER_SHARD)
    paths.insert(2, write_damaged(tmp_path / "in" / "damaged.tar", rng))
    shards = [str(path) for path in paths]
    concurrency = ConcurrencyConfig(shards_in_flight=2, block_bytes=1, sinks=2)
    config = config.model_copy(update={"concurrency": concurrency})
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    log.mkdir()
    report = prepare_locally(config, shards, whole, codec_dir)
    assert report.counts["kept"] > CLIPS + IMAGES
    assert report.counts["failed"] > 0
    command = [sys.executable, "-c", DRIVER, config.model_dump_json(), str(out), str(codec_dir)]
    watched = Watched(out, log, command, shards)
    runs = rng.sample(RUNS, len(RUNS))
    total = CLIPS + IMAGES + DAMAGED
    # One sample from the end there is nothing left to interrupt.
    targets = iter(sorted(rng.uniform(0, total - 2) for kinds in runs for _ in kinds))
    inside, progress, moments = 0, [], []
    for kinds in runs:
        begun = len(watched.lines("pids"))
        driver = watched.start("" if "cluster" in kinds else address)
        try:
            while not any(line.startswith("read") for line in watched.lines("pids")[begun:]):
                assert driver.poll() is None, (log / "errors").read_text()[-3000:]
                time.sleep(0.05)
            for kind in kinds:
                wait_for(watched, driver, next(targets))
                finished = watched.finished()
                moments.append((finished, len(watched.lines("encodes"))))
                progress.append(len(finished) / total)
                inside += bool(watched.unfinished_shards())
                strike(kind, watched, driver, rng)
                assert_manifests_are_true(out)
        finally:
            if driver.poll() is None:
                kill_tree(driver.pid)
            driver.wait()
    final = watched.start(address)
    assert final.wait(timeout=300) == 0, (log / "errors").read_text()[-3000:]
    encodes = watched.lines("encodes")
    print(f"{len(progress)} kills, {inside} inside a shard, at {[round(p, 2) for p in progress]}")
    print(f"{len(encodes)} encodes of {total} samples")
    assert len(progress) == 20
    assert inside >= 15
    assert digests(out) == digests(whole)
    assert not list(out.glob("staging/*"))
    for finished, before in moments:
        assert not finished & set(encodes[before:]), "a finished sample was encoded again"
    # What is encoded twice was in flight: a block or two between encoder and sink.
    assert len(encodes) - total <= 20 * 8


def write_damaged(path: Path, rng: random.Random) -> Path:
    """A shard of clips with flipped bits: where the frames lie, and in two also in their table."""
    samples = []
    for number in range(DAMAGED):
        clip = bytearray(video(moving(20)))
        begin = clip.index(b"mdat") + 4
        end = clip.index(b"moov") if clip.index(b"moov") > begin else len(clip)
        for _ in range(1 + number):
            clip[rng.randrange(begin + (end - begin) // 2, end)] ^= 1 << rng.randrange(8)
        if number % 4 == 3:
            clip[clip.index(b"stsd") + 1] ^= 0x20
        samples.append(sample(f"damaged{number}", mp4=bytes(clip), txt="Damaged."))
    write_shard(path, samples)
    return path


def strike(
    kind: str, watched: Watched, driver: subprocess.Popen[bytes], rng: random.Random
) -> None:
    """One kill -9."""
    if kind == "driver":
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    elif kind == "cluster":
        kill_tree(driver.pid)
        driver.wait()
    else:
        stages = ["read", "DecodeStage", "CaptionStage", "EncodeStage", "SinkStage", "Sink"]
        rng.shuffle(stages)
        victims = [process for stage in stages for process in watched.living(stage)[-1:]]
        assert victims, "no worker is there"
        victims[0].kill()


def assert_manifests_are_true(out: Path) -> None:
    """Every manifest that stands names files that are there, byte for byte."""
    for path in out.glob("manifests/*.json"):
        for entry in json.loads(path.read_text())["files"]:
            content = (out / entry["path"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
