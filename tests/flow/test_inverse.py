"""Solvers of one block, guidance, and attention from a cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal
from torch.nn.attention.bias import causal_lower_right

from flow.attention import attend_last
from flow.guidance import guide
from flow.inverse import Inverter
from tests.flow.models import randn, texts, tiny_model


def _inverter(guidance: float = 2.0, seed: int = 0) -> Inverter:
    model = tiny_model(seed=seed)
    text, null = texts(model, 2)
    rope = model.flow.deep_rope((2, 3), 2, text)
    inverter = Inverter(
        model.flow.deep, rope, batch=2, text_BJE=text, null_BJE=null, guidance=guidance
    )
    inverter.restart()
    return inverter


def test_after_k_sweeps_the_first_k_tokens_are_right() -> None:
    z = randn(2, 12, 4, seed=5)
    reference = _inverter()
    reference.solve(reference.sequential(z))
    for sweeps in range(1, 12):
        inverter = _inverter()
        inverter.tokens_BLC[:] = randn(2, 12, 4, seed=6)
        for _ in range(sweeps):
            inverter.evaluate(0, 12)
            inverter.tokens_BLC.copy_(inverter.mu_BLC + inverter.sigma_BLC * z)
        error = (inverter.tokens_BLC - reference.tokens_BLC).abs().amax(dim=(0, 2))
        assert error[:sweeps].max() < 1e-11
        assert error[sweeps:].max() > 1e-6 or sweeps > 6


@pytest.mark.parametrize("tolerance", [0.0, 1e-30])
@pytest.mark.parametrize("block", [1, 4, 5, 12])
def test_jacobi_equals_sequential_from_any_start(tolerance: float, block: int) -> None:
    z = randn(2, 12, 4, seed=5)
    reference = _inverter()
    reference.solve(reference.sequential(z))
    inverter = _inverter()
    start = 10 * randn(2, 12, 4, seed=8)
    for low in range(0, 12, block):
        part = slice(low, min(low + block, 12))
        sweeps = inverter.solve(inverter.jacobi(z[:, part], start[:, part], tolerance))
        assert sweeps <= block
    torch.testing.assert_close(inverter.tokens_BLC, reference.tokens_BLC, atol=1e-10, rtol=0)


def test_next_block_reads_keys_of_final_tokens_even_when_loosely_converged() -> None:
    z = randn(2, 12, 4, seed=5)
    loose = _inverter()
    sweeps = loose.solve(loose.jacobi(z[:, :6], torch.zeros(2, 6, 4, dtype=z.dtype), tolerance=0.5))
    assert sweeps < 6, "the test wants a block accepted early"
    loose.solve(loose.sequential(z[:, 6:]))
    exact = _inverter()
    exact.restart(loose.tokens_BLC[:, :6])
    exact.solve(exact.sequential(z[:, 6:]))
    torch.testing.assert_close(loose.tokens_BLC, exact.tokens_BLC, atol=1e-11, rtol=0)
    torch.testing.assert_close(loose.mu_BLC, exact.mu_BLC, atol=1e-11, rtol=0)


def test_merged_repair_gives_the_same_as_a_pass_of_its_own() -> None:
    z = randn(2, 12, 4, seed=5)
    zeros = torch.zeros(2, 6, 4, dtype=z.dtype)
    merged, separate = _inverter(), _inverter()
    for inverter in (merged, separate):
        inverter.solve(inverter.jacobi(z[:, :6], zeros, tolerance=0.5))
    separate.solve(separate.refresh())
    for inverter in (merged, separate):
        inverter.solve(inverter.jacobi(z[:, 6:], zeros, tolerance=0.0))
    torch.testing.assert_close(merged.tokens_BLC, separate.tokens_BLC, atol=1e-11, rtol=0)
    assert merged.work.iterations == separate.work.iterations - 1


def test_work_counts_passes_positions_and_prefill() -> None:
    inverter = _inverter()
    z = randn(2, 12, 4, seed=5)
    assert inverter.work.prefilled == 6
    inverter.solve(inverter.sequential(z[:, :4]))
    assert (inverter.work.iterations, inverter.work.evaluations) == (4, 4)
    before = inverter.work.copy()
    sweeps = inverter.solve(inverter.jacobi(z[:, 4:], z[:, 4:], tolerance=1e-2))
    work = inverter.work.since(before)
    assert work.iterations == sweeps
    assert work.evaluations == sum(8 - k for k in range(sweeps))


def test_nan_is_never_taken_for_convergence() -> None:
    inverter = _inverter()
    z = torch.full((2, 12, 4), math.nan, dtype=torch.float64)
    assert inverter.solve(inverter.jacobi(z, z, tolerance=1.0)) == 12


def test_guidance_needs_both_texts() -> None:
    model = tiny_model()
    text, _ = texts(model)
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs"):
        Inverter(
            model.flow.deep,
            model.flow.deep_rope((2, 2), 1, text),
            batch=1,
            text_BJE=text,
            guidance=2.0,
        )


def test_guidance_is_the_tempered_product_of_the_two_gaussians() -> None:
    mu_c, mu_u = randn(50, seed=1), randn(50, seed=2)
    sigma_c, sigma_u = randn(50, seed=3).exp(), randn(50, seed=4).exp()
    w = 2.5
    mu, sigma = guide(mu_c, sigma_c, mu_u, sigma_u, w)
    assert (sigma > 0).all()
    wider = sigma_c <= sigma_u
    x, y = randn(50, seed=5), randn(50, seed=6)

    def score(at: torch.Tensor) -> torch.Tensor:
        return (1 + w) * Normal(mu_c, sigma_c).log_prob(at) - w * Normal(mu_u, sigma_u).log_prob(at)

    # Where no clip acts, log-ratios are those of p_c^(1+w) / p_u^w.
    expected = (score(x) - score(y))[wider]
    ratio = (Normal(mu, sigma).log_prob(x) - Normal(mu, sigma).log_prob(y))[wider]
    torch.testing.assert_close(ratio, expected)
    torch.testing.assert_close(guide(mu_c, sigma_c, mu_c, sigma_c, w), (mu_c, sigma_c))


@pytest.mark.parametrize(("length", "places"), [(1, 7), (3, 7), (7, 7)])
def test_attention_of_the_last_places_is_causal(length: int, places: int) -> None:
    q, k, v = (
        randn(2, 3, places, 8, seed=1),
        randn(2, 3, places, 8, seed=2),
        randn(2, 3, places, 8, seed=3),
    )
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    last = q[:, :, places - length :]
    torch.testing.assert_close(attend_last(last, k, v), whole[:, :, places - length :])
    if length > 1:
        accelerator = torch.nn.functional.scaled_dot_product_attention(
            last, k, v, attn_mask=causal_lower_right(length, places)
        )
        torch.testing.assert_close(accelerator, whole[:, :, places - length :])
