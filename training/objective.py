"""The two losses of a step: likelihood of the flow, and flow-score matching of the denoiser.

σ is the noise on the data: the flow models x_noisy = x + σ·ε (arXiv 2511.20462; the target and its
scale are in `docs/design.md`, "The model exactly"). Under data parallelism every worker calls this
on its equal share, and FSDP averages the gradients; where a share is taken in several
micro-batches, their gradients add up. Knows nothing of optimizers, workers or where
batches come from.

Shapes: x [B, T, C, h, w] (or [B, C, h, w] in image models), text_BJE [B, J, E]: B batch, T latent
frames, C channels, h, w latent rows and columns, J text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.flow import DENOISE_STEP, FlowOutput

RunFlow = Callable[[Tensor, Tensor | None], FlowOutput]
"""A flow, or a flow in the precision that a step computes in."""
RunDenoiser = Callable[[Tensor, Tensor | None], Tensor]
"""The same of a denoiser."""


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
    flow: RunFlow,
    x_noisy: Tensor,
    text_BJE: Tensor | None,
    sigma: float,
    *,
    with_target: bool,
    share: float = 1.0,
) -> FlowLoss:
    """Loss of the flow and its backward; the input's gradient becomes the denoiser's target.

    The loss that is differentiated is weighted by σ/δ, δ being `DENOISE_STEP`. The gradient it
    leaves in the input, times numel·σ (the loss is a mean over the numel elements of this worker's
    batch), is the target of flow-score matching: with it the one-step denoiser x_noisy − δ·target
    is Tweedie's x_noisy + σ²∇log p(x_noisy).

    Args:
        flow: its parameters' gradients are added to.
        sigma: σ, the model's `noise_std`.
        with_target: also keep the input's gradient.
        share: what the gradients are weighted by: this batch's part of the samples of a step. Loss
            and target are those of the batch by itself.
    """
    x = x_noisy.detach().requires_grad_(with_target)
    output = flow(x, text_BJE)
    loss = output.loss()
    # A flow that is frozen as a whole has no gradient unless the input asks for one.
    if loss.requires_grad:
        # Out of autocast: what was computed in fp32 has its gradient in fp32.
        (loss * (sigma / DENOISE_STEP * share)).backward()
    log_dets = torch.stack([b.detach().float().mean() for b in output.block_log_det])
    target = None
    if with_target:
        assert x.grad is not None
        target = x.grad * (x.numel() * sigma / share)
    return FlowLoss(loss.detach(), log_dets, target)


def denoiser_backward(
    denoiser: RunDenoiser,
    x_noisy: Tensor,
    text_BJE: Tensor | None,
    score_target: Tensor,
    share: float = 1.0,
) -> Tensor:
    """Mean squared error of the denoiser against the flow's score, and its backward; 0-dim.

    `share` weights the gradients, as in `flow_backward`.
    """
    loss = (denoiser(x_noisy.detach(), text_BJE).float() - score_target).square().mean()
    (loss * share).backward()
    return loss.detach()
