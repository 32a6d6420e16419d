"""The optimizer equals torch's AdamW with clipping, or Muon; skips leave no trace; rates end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.world import small_config
from training.optimizer.optim import LearningRate, ShardedOptimizer, SkipRule
from training.sections import OptimizerConfig


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def adamw(net: nn.Module) -> ShardedOptimizer:
    config = small_config().optimizer
    return ShardedOptimizer(net.named_parameters(), config, LearningRate.of(config, 1e-2, steps=6))


def loss_of(net: nn.Module, scale: float) -> Tensor:
    return (net(torch.linspace(-1, 1, 20).reshape(4, 5)) * scale).square().mean()


def one_step(
    net: nn.Module, optimizer: ShardedOptimizer, step: int, scale: float, skip: float
) -> None:
    loss_of(net, scale).backward()
    norm = optimizer.take_gradients().sqrt()
    optimizer.step(step, norm, torch.tensor(skip))


def test_equals_torch_adamw_after_clip_grad_norm() -> None:
    config = small_config(optimizer={"weight_decay": 0.1, "warmup_steps": 3}).optimizer
    ours, theirs = network(), network()
    rates = LearningRate.of(config, 1e-2, steps=10)
    optimizer = ShardedOptimizer(ours.named_parameters(), config, rates)
    weights = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=config.adam_betas,
        foreach=False,
    )
    for step in range(10):
        one_step(ours, optimizer, step, 5.0, 0.0)
        loss_of(theirs, 5.0).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip_norm)
        for group in plain.param_groups:
            group["lr"] = rates.at(step)
        plain.step()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


class Layered(nn.Module):
    """Matrices inside layers, tall and wide, and what is around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.proj_in = nn.Linear(5, 6)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        self.proj_out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.layers(self.proj_in(x)))


def muon(net: nn.Module, **changes: Any) -> ShardedOptimizer:
    config = small_config(optimizer={"kind": "muon", **changes}).optimizer
    return ShardedOptimizer(net.named_parameters(), config, LearningRate.of(config, 1e-2, steps=6))


def test_only_inner_matrices_move_by_muon_and_as_torch_s_moves_them() -> None:
    ours, by_muon = Layered(), Layered()
    optimizer = muon(ours, weight_decay=0.1, warmup_steps=0, clip_norm=1e9)
    inner = [by_muon.layers[0].weight, by_muon.layers[2].weight]
    theirs = torch.optim.Muon(inner, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        # The same gradients for both, whatever their weights are by now.
        gradients = [torch.randn_like(p) for p in ours.parameters()]
        for net in (ours, by_muon):
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        norm = optimizer.take_gradients().sqrt()
        optimizer.step(step, norm, torch.tensor(0.0))
        for group in theirs.param_groups:
            group["lr"] = optimizer.learning_rate.at(step)
        theirs.step()
    start = Layered()
    for index in (0, 2):
        first = start.layers[index].weight.detach()
        moved = ours.layers[index].weight.detach() - first
        expected = by_muon.layers[index].weight.detach() - first
        # torch orthogonalises in bf16, and this here in fp32.
        assert float((moved - expected).norm() / expected.norm()) < 2e-2
    assert set(optimizer.muon.momentum) == {"layers.0.weight", "layers.2.weight"}
    assert "exp_avg.proj_in.weight" in optimizer.state()


@pytest.mark.parametrize("make", [adamw, muon])
def test_a_skipped_step_changes_neither_weights_nor_moments(
    make: Callable[[nn.Module], ShardedOptimizer],
) -> None:
    net = Layered()
    optimizer = make(net)
    one_step(net, optimizer, 0, 1.0, 0.0)
    before = {k: v.clone() for k, v in optimizer.state().items() if not k.startswith("ema")}
    weights = [p.detach().clone() for p in net.parameters()]
    one_step(net, optimizer, 1, float("nan"), 1.0)
    after = optimizer.state()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_swapping_averaged_weights_twice_is_nothing() -> None:
    net = network()
    optimizer = adamw(net)
    one_step(net, optimizer, 0, 1.0, 0.0)
    weights = [p.detach().clone() for p in net.parameters()]
    optimizer.swap_ema()
    assert not torch.equal(weights[0], next(net.parameters()))
    optimizer.swap_ema()
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_schedule_warms_up_and_ends_at_its_ratio() -> None:
    config = OptimizerConfig(warmup_steps=10, final_learning_rate_ratio=0.1)
    rates = [LearningRate.of(config, 2.0, steps=100).at(step) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert abs(rates[100] - 0.2) < 1e-9
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_a_spike_is_judged_against_the_running_median() -> None:
    rule = SkipRule(OptimizerConfig(spike_factor=4.0, spike_median_steps=8), torch.device("cpu"))

    def decide(norm: float) -> float:
        norms = torch.tensor([norm, 0.0])
        return float(rule.decide(norms, norms))

    assert decide(100.0) == 0.0, "no median yet"
    assert [decide(1.0 + 0.1 * i) for i in range(8)] == [0.0] * 8
    assert decide(50.0) == 1.0
    assert decide(float("nan")) == 1.0
    assert rule.counts.tolist() == [9, 2, 2]
    assert decide(2.0) == 0.0
    assert rule.counts.tolist() == [10, 2, 0]
