"""Latents in an object store are trained on like latents on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from flow.model_folder import load_model
from tests.data_prep.s3_server import CREDENTIALS, running_store
from tests.training.world import small_request, write_dataset
from training.run import train_in_process


def test_training_from_a_store_gives_the_weights_of_training_from_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_dataset(tmp_path / "data")
    with running_store(tmp_path) as store:
        for path in data.rglob("*"):
            if path.is_file():
                store.upload(path, f"latents/{path.relative_to(data)}")
        # However little is kept from batch to batch.
        disk, remote = (
            LatentDataset(root, "all", cached_groups=1) for root in (data, store.uri("latents"))
        )
        for ids in disk.buckets.values():
            for start in (5, 0, 9):
                ours, theirs = (one.load(ids[start : start + 6]) for one in (disk, remote))
                assert torch.equal(ours.mean_BTCHW, theirs.mean_BTCHW)
                assert ours.captions == theirs.captions
        states = []
        for number, root in enumerate((data, store.uri("latents"))):
            out = tmp_path / f"out{number}"
            result = train_in_process(small_request(root, out))
            states.append(load_model(result.model_dir)[0].state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
