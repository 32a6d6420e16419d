"""The optimizer equals torch's AdamW with clipping; skips leave no trace; the schedule's ends."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from tests.training.world import small_config
from training.config import OptimizerConfig
from training.optim import LearningRate, ShardedAdamW, SkipRule


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def adamw(net: nn.Module) -> ShardedAdamW:
    config = small_config().optimizer
    return ShardedAdamW(net.named_parameters(), config, LearningRate.of(config, 1e-2, steps=6))


def loss_of(net: nn.Module, scale: float) -> Tensor:
    return (net(torch.linspace(-1, 1, 20).reshape(4, 5)) * scale).square().mean()


def one_step(net: nn.Module, optimizer: ShardedAdamW, step: int, scale: float, skip: float) -> None:
    loss_of(net, scale).backward()
    norm = optimizer.take_gradients().sqrt()
    optimizer.step(step, norm, torch.tensor(skip))


def test_equals_torch_adamw_after_clip_grad_norm() -> None:
    config = small_config(optimizer={"weight_decay": 0.1, "warmup_steps": 3}).optimizer
    ours, theirs = network(), network()
    rates = LearningRate.of(config, 1e-2, steps=10)
    optimizer = ShardedAdamW(ours.named_parameters(), config, rates)
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


def test_a_skipped_step_changes_neither_weights_nor_moments() -> None:
    net = network()
    optimizer = adamw(net)
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
