"""A tiny codec, a tiny world in two shards, and paths to the real samples where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.config import BucketConfig, PrepareConfig
from data_prep.world.shards import write_world
from tests.data_prep.ray_cluster import running_cluster
from tests.data_prep.s3_server import (
    CREDENTIALS,
    Store,
    running_store,
)
from tests.places import ROOT
from tests.tiny_codec import CODEC


@pytest.fixture(scope="session")
def codec_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from flow.codec import build_vae, save_codec

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    save_codec(build_vae(CODEC), folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two shards of four clips and one of three images."""
    paths = write_world(tmp_path_factory.mktemp("world"), 8, 3, clips_per_shard=4, seed=5)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs."""
    with running_cluster():
        yield


@pytest.fixture(scope="session")
def config() -> PrepareConfig:
    return PrepareConfig(bucket=BucketConfig(num_frames=5, height=32, width=32, fps=8.0))


def real_folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"{variable} is not there")
    return folder


@pytest.fixture(scope="session")
def panda_samples() -> Path:
    return real_folder("FLOWREEL_PANDA_SAMPLES", "panda_samples")


@pytest.fixture(scope="session")
def odd_videos() -> Path:
    return real_folder("FLOWREEL_ODD_VIDEOS", "odd_videos")


@pytest.fixture(scope="session")
def odd_inputs() -> Path:
    return real_folder("FLOWREEL_ODD_INPUTS", "odd_inputs")


@pytest.fixture
def store(store_server: Store) -> Store:
    """An empty store, reachable, whatever the test before left there."""
    store_server.empty()
    return store_server


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An S3-compatible server on localhost."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with running_store(tmp_path_factory.mktemp("store")) as running:
            yield running
