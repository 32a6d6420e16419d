"""However weights and work are spread over workers, a step is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.training import group
from tests.training.steps import difference, laws
from tests.training.world import small_config
from training.parallel import ParallelError, choose_backend
from training.sections import WorkerConfig

BATCHES = {"batch_size": 8, "image_batch_size": 8}
BF16 = {"batches": BATCHES, "precision": "bf16"}


def few(world: int) -> list[dict[str, Any]]:
    """Settings of so many workers, each way of sharing once."""
    twice = {**BATCHES, "accumulate": 2}
    return [
        {"batches": BATCHES, "workers": fsdp(world), "memory": {"checkpointing": "full"}},
        {"batches": twice, "workers": {"strategy": "ddp", "count": world}},
        {
            "batches": twice,
            "workers": {"strategy": "hsdp", "count": world, "shard_size": 2},
            "memory": {"checkpointing": "selective"},
        },
        {**BF16, "workers": fsdp(world)},
        {"batches": BATCHES, "workers": fsdp(world), "memory": {"offload_optimizer": True}},
    ]


def many(world: int) -> list[dict[str, Any]]:
    """And more ways at once."""
    return [
        *few(world),
        {"batches": {**BATCHES, "accumulate": 2}, "workers": fsdp(world)},
        {"batches": BATCHES, "workers": {"strategy": "ddp", "count": world}},
        {"batches": BATCHES, "workers": {"strategy": "hsdp", "count": world, "shard_size": 2}},
        {**BF16, "workers": fsdp(world, shard_granularity="block")},
        {**BF16, "workers": fsdp(world, shard_granularity="model")},
    ]


def fsdp(world: int, **changes: Any) -> dict[str, Any]:
    return {"strategy": "fsdp", "count": world, **changes}


def check(world: int, settings: list[dict[str, Any]], folder: Path) -> None:
    ranks = group.results("tests.training.steps:laws", world, folder, settings=settings)
    (single,) = laws([{"batches": BATCHES}])
    (single_bf16,) = laws([BF16])
    for rank in ranks:
        for setting, found in zip(settings, rank, strict=True):
            assert difference(found, single, "start") == 0, setting
            if setting.get("precision") == "bf16":
                # Evaluation runs in the precision of training: gathered layers are bf16.
                assert difference(found, single_bf16, "nats") < 2e-3, setting
                continue
            assert difference(found, single, "weights") < 1e-5, setting
            assert difference(found, single, "nats") < 1e-5, setting
            torch.testing.assert_close(
                found["metrics"], single["metrics"], rtol=1e-5, atol=1e-5, msg=str(setting)
            )
            assert found["digest"] == pytest.approx(float(single["digest"]), rel=1e-6), setting


def test_two_workers_take_the_steps_of_one_by_every_strategy(tmp_path: Path) -> None:
    check(2, few(2), tmp_path / "group")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_so_do_more_of_them_and_in_every_granularity(world: int, tmp_path: Path) -> None:
    check(world, many(world), tmp_path / "group")


def test_groups_of_workers_are_whole() -> None:
    with pytest.raises(ValidationError, match="'hsdp' needs one"):
        WorkerConfig(strategy="hsdp", count=4)
    with pytest.raises(ValidationError, match="no other strategy takes one"):
        WorkerConfig(strategy="ddp", count=4, shard_size=2)
    with pytest.raises(ValidationError, match=r"count 6 must be a multiple of .*shard_size 4"):
        small_config(workers={"strategy": "hsdp", "count": 6, "shard_size": 4})


def test_more_workers_than_gpus_are_refused_rather_than_trained_on_cpus() -> None:
    four = WorkerConfig(strategy="fsdp", count=4)
    assert choose_backend(four, gpus=4) == "nccl"
    assert choose_backend(four, gpus=0) == "gloo", "no GPU anywhere: CPUs are what there is"
    with pytest.raises(ParallelError, match=r"4 training workers, but 3 GPUs.*count to 3, or"):
        choose_backend(four, gpus=3)
    asked = WorkerConfig(strategy="fsdp", count=4, backend="nccl")
    with pytest.raises(ParallelError, match=r"but 0 GPUs.*'gloo'"):
        choose_backend(asked, gpus=0)
    on_cpus = WorkerConfig(strategy="fsdp", count=4, backend="gloo")
    assert choose_backend(on_cpus, gpus=3) == "gloo"
