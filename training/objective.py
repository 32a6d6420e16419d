"""The two losses of a step: likelihood of the flow, and flow-score matching of the denoiser.

σ is the noise on the data: the flow models x_noisy = x + σ·ε. Knows nothing of optimizers, workers
or batches' origin; under data parallelism every worker calls this on its equal share and gradients
are averaged by FSDP.

Shapes: x [B, T, C, h, w] (or [B, C, h, w] in image models), text [B, J, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DENOISE_SCALE = 0.3
"""x = x_noisy − 0.3·s(x_noisy) (arXiv 2511.20462, flow-score matching)."""


@dataclass(frozen=True)
class FlowLoss:
    """What one forward and backward of the flow left behind.

    Attributes:
        nats_per_dim: mean of ½z² − Σ log|det|, without the constant ½ ln 2π; 0-dim.
        block_log_det: mean log|det| per dimension of every block [blocks].
        score_target: what the denoiser is to predict, σ·(σ/0.3)·∇ₓ(−log p(x_noisy)), of x's shape;
            None when not asked for.
    """

    nats_per_dim: Tensor
    block_log_det: Tensor
    score_target: Tensor | None


def flow_backward(
    flow: nn.Module, x_noisy: Tensor, text_BLD: Tensor | None, sigma: float, *, with_target: bool
) -> FlowLoss:
    """Loss of the flow and its backward; the gradient left in the input becomes the denoiser's
    target.

    The loss that is differentiated is weighted by σ/0.3. Its input gradient, times numel·σ (the
    loss being a mean over the numel elements of this worker's batch), is then the target of DESIGN
    section 3; with it the one-step denoiser is Tweedie's x_noisy + σ²∇log p(x_noisy).
    """
    x = x_noisy.detach().requires_grad_(with_target)
    output = flow(x, text_BLD)
    loss = output.loss()
    (loss * (sigma / DENOISE_SCALE)).backward()
    log_dets = torch.stack([b.detach().float().mean() for b in output.block_log_det])
    target = None
    if with_target:
        assert x.grad is not None
        target = x.grad * (x.numel() * sigma)
    return FlowLoss(loss.detach(), log_dets, target)


def denoiser_backward(
    denoiser: nn.Module, x_noisy: Tensor, text_BLD: Tensor | None, score_target: Tensor
) -> Tensor:
    """Mean squared error of the denoiser against the flow's score, and its backward; 0-dim."""
    loss = (denoiser(x_noisy.detach(), text_BLD).float() - score_target).square().mean()
    loss.backward()
    return loss.detach()
