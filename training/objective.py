"""The two losses of a step: likelihood of the flow, and flow-score matching of the denoiser.

σ is the noise on the data: the flow models x_noisy = x + σ·ε (arXiv 2511.20462; the target and its
scale are in `docs/design.md`, "The model exactly"). Under data parallelism every worker calls this
on its equal share, and FSDP averages the gradients. Knows nothing of optimizers, workers or where
batches come from.

Shapes: x [B, T, C, h, w] (or [B, C, h, w] in image models), text_BJE [B, J, E]: B batch, T latent
frames, C channels, h, w latent rows and columns, J text tokens, E text width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flow.flow import DENOISE_STEP


@dataclass(frozen=True)
class FlowLoss:
    """What one forward and backward of the flow left behind.

    Attributes:
        nats_per_dim: mean of ½z² − Σ log|det|, without the constant ½ ln 2π; 0-dim.
        block_log_det: mean log|det| per dimension of every block [blocks].
        score_target: what the denoiser is to predict, σ·(σ/δ)·∇ₓ(−log p(x_noisy)) with δ the
            `DENOISE_STEP`, of x's shape; None when not asked for.
    """

    nats_per_dim: Tensor
    block_log_det: Tensor
    score_target: Tensor | None


def flow_backward(
    flow: nn.Module, x_noisy: Tensor, text_BJE: Tensor | None, sigma: float, *, with_target: bool
) -> FlowLoss:
    """Loss of the flow and its backward; the input's gradient becomes the denoiser's target.

    The loss that is differentiated is weighted by σ/δ, δ being `DENOISE_STEP`. The gradient it
    leaves in the input, times numel·σ (the loss is a mean over the numel elements of this worker's
    batch), is the target of flow-score matching: with it the one-step denoiser x_noisy − δ·target
    is Tweedie's x_noisy + σ²∇log p(x_noisy).

    Args:
        flow: makes a `flow.flow.FlowOutput`; its parameters' gradients are added to.
        sigma: σ, the model's `noise_std`.
        with_target: also keep the input's gradient.
    """
    x = x_noisy.detach().requires_grad_(with_target)
    output = flow(x, text_BJE)
    loss = output.loss()
    # A flow that is frozen as a whole has no gradient unless the input asks for one.
    if loss.requires_grad:
        (loss * (sigma / DENOISE_STEP)).backward()
    log_dets = torch.stack([b.detach().float().mean() for b in output.block_log_det])
    target = None
    if with_target:
        assert x.grad is not None
        target = x.grad * (x.numel() * sigma)
    return FlowLoss(loss.detach(), log_dets, target)


def denoiser_backward(
    denoiser: nn.Module, x_noisy: Tensor, text_BJE: Tensor | None, score_target: Tensor
) -> Tensor:
    """Mean squared error of the denoiser against the flow's score, and its backward; 0-dim."""
    loss = (denoiser(x_noisy.detach(), text_BJE).float() - score_target).square().mean()
    loss.backward()
    return loss.detach()
