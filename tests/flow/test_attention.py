"""Attention: gradients in bf16 are those of fp32, and of fp32's quality."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flow.attention import attend


def gradients(dtype: torch.dtype, *, is_causal: bool, autocast: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, 3, 24, 32, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    ]
    weights = torch.randn(2, 3, 24, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attend(*leaves, is_causal=is_causal)
    assert out.dtype == (torch.bfloat16 if autocast else dtype)
    return list(torch.autograd.grad((out.float() * weights).sum(), leaves))


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_in_bf16_are_those_of_fp32_but_for_rounding(is_causal: bool) -> None:
    exact = gradients(torch.float32, is_causal=is_causal)
    # Inputs are rounded to 8 bits, and gradients too: 2^-8 each way.
    for rounded in (
        gradients(torch.bfloat16, is_causal=is_causal),
        gradients(torch.bfloat16, is_causal=is_causal, autocast=True),
    ):
        for a, b in zip(rounded, exact, strict=True):
            assert a.dtype == torch.bfloat16
            assert float((a.float() - b).norm() / b.norm()) < 1e-2


def test_the_slow_backward_kernel_of_bf16_is_not_taken_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    kernel = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    gradients(torch.bfloat16, is_causal=True, autocast=True)
    with torch.no_grad():
        attend(*(torch.randn(1, 1, 4, 32).bfloat16() for _ in range(3)))
    assert seen == [(torch.float32, False), (torch.bfloat16, False)]
