"""Start weights: of the seed alone, whatever the number of workers, and the modules' own values."""

from __future__ import annotations

import math

import pytest
import torch

from flow.attention import GainNorm
from flow.config import tiny
from training.weights import fresh_model


def test_start_values_are_those_of_the_modules() -> None:
    model = fresh_model(tiny(deep_width=256, head_dim=32), 0).requires_grad_(False)
    up = model.flow.deep.layers[0].mlp.up
    bound = 1 / math.sqrt(up.in_features)
    assert float(up.weight.abs().max()) <= bound
    assert float(up.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert float(model.flow.deep.sos.std()) == pytest.approx(0.02, rel=1.0)
    for name, module in model.named_modules():
        if isinstance(module, GainNorm) or name.endswith("proj_out"):
            assert all(not p.any() for p in module.parameters())
        if isinstance(module, torch.nn.LayerNorm):
            assert bool((module.weight == 1).all())


def test_no_two_modules_and_no_two_seeds_start_alike() -> None:
    one, other = fresh_model(tiny(), 0), fresh_model(tiny(), 1)
    first, second = (one.flow.deep.layers[i].mlp.up.weight for i in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, other.flow.deep.layers[0].mlp.up.weight)
    state = torch.get_rng_state()
    fresh_model(tiny(), 0)
    assert torch.equal(state, torch.get_rng_state())
