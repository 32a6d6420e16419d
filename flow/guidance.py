"""Classifier-free guidance of an affine autoregressive step: two Gaussians in, one out.

Knows formulas only. The two Gaussians come from one batch through the deep block, whose first half
read the text and whose second half the null text.
"""

from __future__ import annotations

from torch import Tensor


def guide(
    mu_text: Tensor, sigma_text: Tensor, mu_null: Tensor, sigma_null: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Guided mean and scale of every element, of the shape given.

    The product of powers p_text^(1+w) / p_null^w of two Gaussians, tempered by
    s = min(sigma_text / sigma_null, 1)^2 so that the result is always a Gaussian:

        sigma = sigma_text / sqrt(1 + w - w s)
        mu    = ((1 + w) mu_text - w s mu_null) / (1 + w - w s)

    Source: `docs/design.md`, "The model exactly", guidance.

    >>> import torch
    >>> one = torch.tensor(1.0)
    >>> mu, sigma = guide(mu_text=2 * one, sigma_text=one, mu_null=one, sigma_null=one, weight=3.0)
    >>> float(mu), float(sigma)
    (5.0, 1.0)
    """
    # The order of operations is the reference's: small sigmas magnify any other rounding.
    ws = (sigma_text / sigma_null).clamp(max=1.0).square() * weight
    precision = 1.0 + weight - ws
    mu = ((1.0 + weight) * mu_text - ws * mu_null) / precision
    return mu, sigma_text / precision.sqrt()


def guide_pair(mu_2B: Tensor, sigma_2B: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """`guide` for a batch whose first half read the text and whose second half the null text.

    >>> import torch
    >>> mu, sigma = guide_pair(torch.tensor([[2.0], [1.0]]), torch.ones(2, 1), weight=3.0)
    >>> mu, sigma
    (tensor([[5.]]), tensor([[1.]]))
    """
    mu_text, mu_null = mu_2B.chunk(2)
    sigma_text, sigma_null = sigma_2B.chunk(2)
    return guide(mu_text, sigma_text, mu_null, sigma_null, weight)
