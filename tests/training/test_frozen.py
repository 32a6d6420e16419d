"""Frozen parameters stay as they are, take no optimizer state, and are proved to have stayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from flow.config import tiny
from flow.flow import FlowModel
from tests.training import workers
from tests.training.world import small_config, small_request, two_workers, write_dataset
from training.record.history import read_history
from training.run import check_run, train_in_process
from training.start.frozen import FreezeError, Frozen, FrozenChanged, freeze
from training.state.checkpoint import (
    Checkpoint,
    CheckpointMismatch,
    latest_complete,
    load_averaged,
)
from training.weights import fresh_model

PATTERNS = ("flow.shallow.*", "flow.deep.layers.0.*", "*.sos")
SCHEDULE = {"optimizer": {"schedule_steps": 6}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("latents") / "data")


def newest(out: Path) -> Checkpoint:
    checkpoint = latest_complete(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def weights(out: Path) -> dict[str, Tensor]:
    model = FlowModel(tiny())
    load_averaged(newest(out), model)
    return model.state_dict()


def frozen_config(**changes: Any) -> Any:
    return small_config(freeze=PATTERNS, **SCHEDULE, **changes)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frozen")
    train_in_process(small_request(dataset, out, frozen_config()))
    return out


def is_frozen(name: str) -> bool:
    return name.startswith(("flow.shallow.", "flow.deep.layers.0.")) or name.endswith(".sos")


def test_what_is_frozen_stays_and_all_else_moves(run: Path) -> None:
    before, after = fresh_model(tiny(), seed=0).state_dict(), weights(run)
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert stayed == {name for name in before if is_frozen(name)}


def test_what_is_frozen_has_no_optimizer_state_and_no_averaged_copy(run: Path) -> None:
    stored = FileSystemReader(newest(run).path).read_metadata().state_dict_metadata
    of_optimizers = [key for key in stored if key.startswith("optimizer.")]
    names = [name for name, _ in FlowModel(tiny()).named_parameters()]
    for name in names:
        network, _, key = name.partition(".")
        copies = [
            k
            for k in of_optimizers
            if k.startswith(f"optimizer.{network}.") and k.endswith(f".{key}")
        ]
        assert len(copies) == (0 if is_frozen(name) else 3), name
        assert f"model.{name}" in stored


def test_a_resumed_run_with_frozen_parameters_is_bit_equal(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    train_in_process(small_request(dataset, tmp_path, frozen_config(steps=3)))
    assert train_in_process(small_request(dataset, tmp_path, frozen_config())).resumed_from == 3
    halves, whole = weights(tmp_path), weights(run)
    assert all(torch.equal(halves[name], whole[name]) for name in whole)
    assert newest(tmp_path).description["frozen"] == newest(run).description["frozen"]
    with pytest.raises(CheckpointMismatch, match=r"train\.freeze is \[\] but the checkpoint has"):
        check_run(small_request(dataset, tmp_path, small_config(**SCHEDULE)))


@pytest.mark.slow
def test_two_workers_freeze_as_one_does(run: Path, dataset: Path, tmp_path: Path) -> None:
    config = frozen_config(workers=two_workers())
    workers.run(config, check_run(small_request(dataset, tmp_path, config)).job)
    one, two = weights(run), weights(tmp_path)
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5
    assert newest(tmp_path).description["frozen"] == newest(run).description["frozen"]


@pytest.mark.parametrize("network", ["flow", "denoiser"])
def test_a_whole_network_can_be_frozen(network: str, dataset: Path, tmp_path: Path) -> None:
    config = small_config(
        freeze=[f"{network}.*"], steps=3, denoiser_from_step=1, optimizer={"kind": "muon"}
    )
    train_in_process(small_request(dataset, tmp_path, config))
    before, after = fresh_model(tiny(), seed=0).state_dict(), weights(tmp_path)
    for name in before:
        if name.startswith(network):
            assert torch.equal(before[name], after[name])
    last = read_history(tmp_path / "history.jsonl")[-1]
    assert (last["flow_grad_norm"] == 0) == (network == "flow")
    assert (last["denoiser_loss"] is None) == (network == "denoiser")


def test_muon_alone_trains_matrices(dataset: Path, tmp_path: Path) -> None:
    """Where nothing but matrices of layers is trained, AdamW has nothing to do."""
    frozen = ["*.bias", "*norm*", "*.sos", "*proj_in*", "*proj_txt*", "*proj_out*", "denoiser.*"]
    schedule = {"kind": "muon", "schedule_steps": 4}
    for name, steps in (("whole", (4,)), ("halves", (2, 4))):
        for count in steps:
            config = small_config(freeze=frozen, optimizer=schedule, steps=count)
            train_in_process(small_request(dataset, tmp_path / name, config))
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(halves[name], whole[name]) for name in whole)


def test_a_pattern_that_matches_nothing_is_refused_with_near_names(
    dataset: Path, tmp_path: Path
) -> None:
    for patterns, message in (
        (
            ["flow.deep.layer.0.*"],
            r"'flow\.deep\.layer\.0\.\*' matches no .*: flow\.deep\.layers\.0\.",
        ),
        (["flow.*", "denoiser.*"], "matches every parameter: leave something to train"),
    ):
        with pytest.raises(FreezeError, match=message):
            check_run(small_request(dataset, tmp_path / "out", small_config(freeze=patterns)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_single_bit_and_an_exchange_are_seen(dtype: torch.dtype) -> None:
    layer = nn.Linear(5, 3).to(dtype)
    freeze(layer, ["weight"])
    frozen = Frozen.of(layer)
    frozen.check(layer)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    for bit in range(8 * dtype.itemsize):
        bits = layer.weight.detach().view(integers)
        kept = bits[1, 2].clone()
        bits[1, 2] ^= torch.tensor(1, dtype=integers) << bit
        with pytest.raises(FrozenChanged, match="weight"):
            frozen.check(layer)
        bits[1, 2] = kept
    frozen.check(layer)
    with torch.no_grad():
        layer.weight[[0, 1]] = layer.weight[[1, 0]]
    with pytest.raises(FrozenChanged, match="weight"):
        frozen.check(layer)


def test_a_checkpoint_whose_frozen_values_are_others_is_refused(run: Path) -> None:
    model = fresh_model(tiny(), seed=0)
    freeze(model, PATTERNS)
    Frozen.of(model).check_loaded(newest(run))
    with torch.no_grad():
        model.flow.deep.sos.add_(1)
    with pytest.raises(FrozenChanged, match=r"holds frozen parameters of digest .* began with"):
        Frozen.of(model).check_loaded(newest(run))
