"""The commands with shards, latents and nothing else in an object store that fails on the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from data_prep.ledger.locks import lock_output
from data_prep.storage.store import open_folder
from data_prep.world.shards import write_world
from pipeline.recipes import load_recipe
from tests.data_prep.in_process import digests, prepare_locally
from tests.data_prep.ledger.test_resuming import downloaded
from tests.data_prep.ray_cluster import RAY_ENVIRONMENT
from tests.data_prep.s3_server import Store
from tests.places import ROOT


def flowreel(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **RAY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def staged(store: Store) -> int:
    return sum(name.endswith(".arrow") for name in store.names("out/staging"))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_prepare_and_train_in_a_store_that_fails_on_the_way(store: Store, tmp_path: Path) -> None:
    paths = write_world(tmp_path / "in", 96, 16, clips_per_shard=32, seed=3)
    for path in paths:
        store.upload(path, f"in/{path.name}")
    out = store.uri("out")
    # A block a sample: otherwise a shard is one block, and none is staged.
    command = ("prepare", "--shards", store.uri("in"), "--out", out)
    command += ("--set", "prepare.concurrency.block_bytes=1")
    with lock_output(open_folder(out)), flowreel(*command) as second:
        _, message = second.communicate(timeout=240)
    assert second.returncode == 2
    assert "another run is writing to s3://flowreel/out" in message
    with flowreel(*command) as first:
        wait_until(lambda: staged(store) >= 3, first)
        store.gate.state = "broken"
        _, message = first.communicate(timeout=240)
    store.gate.state = "open"
    assert first.returncode == 2, message
    assert message.splitlines()[-1].startswith("flowreel: cannot ")
    assert "run the same command again: what is finished is kept" in message
    assert staged(store) >= 3
    assert len(store.names("out/manifests")) < 4
    with flowreel(*command) as again:
        table, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "112" in table
    config: PrepareConfig = load_recipe("tiny", ["prepare.concurrency.block_bytes=1"]).prepare
    whole = tmp_path / "whole"
    uris = [store.uri(f"in/{path.name}") for path in sorted(paths)]
    prepare_locally(config, uris, whole, Path(load_recipe("tiny").codec_source))
    got = digests(downloaded(store, "out", tmp_path / "got"))
    assert got.pop("recipe.yaml")
    assert got == digests(whole)
    model = tmp_path / "model"
    with flowreel("train", "--data", out, "--out", str(model), "--steps", "2") as trained:
        _, errors = trained.communicate(timeout=300)
    assert trained.returncode == 0, errors
    assert (model / "model" / "model.safetensors").is_file()


def wait_until(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    assert callable(condition)
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
