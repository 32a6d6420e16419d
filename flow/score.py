"""The score ∇ log p of a flow, and denoising by it: one forward and one backward pass.

This is the baseline that the paper holds its learned denoiser against (arXiv 2511.20462, ablation
of denoisers; `docs/design.md`, "The model exactly"). Knows the flow and whole clips. Knows nothing
of streams: the gradient of later frames' density reaches earlier ones, so nothing is final before
the last frame is there.

*Score* always means this gradient; how likely a video is, is its likelihood (`flow.likelihood`).

Shapes: B batch, T latent frames, h, w latent cells, H, W tokens, C channels, L tokens of a
sequence, J text tokens, E text width, M model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flow.flow import DeepShallowFlow
from flow.likelihood import CHUNK_TOKENS, checked_windows
from flow.sample_spec import ContextWindow
from flow.tokens import frame_sequence, unpatchify


def score(
    flow: DeepShallowFlow,
    x: Tensor,
    text_BJE: Tensor | None = None,
    *,
    windows: Sequence[ContextWindow] | None = None,
) -> Tensor:
    """∇ₓ log p(x | text) of latents, of their shape and in fp32 or wider.

    Memory: the deep block's layers are recomputed in the backward one by one, and the shallow
    blocks take a few frames at a time. Parameters get no gradients. For unsharded weights.

    Args:
        flow: the flow.
        x: latents [B, T, C, h, w], or images [B, C, h, w].
        text_BJE: text; None for none.
        windows: context windows, as in `flow.likelihood.likelihood`.

    >>> from flow.config import tiny
    >>> flow = DeepShallowFlow(tiny())  # fresh, so that x is standard normal under it
    >>> x = torch.randn(1, 2, 4, 2, 2)
    >>> torch.allclose(score(flow, x), -x, atol=1e-5)
    True
    """
    # A caller's inference mode would forbid the backward, and its tensors can take no part in one.
    with torch.inference_mode(False), torch.no_grad():
        x_BTHWC = flow.tokens(x.clone())
        text_BJE = None if text_BJE is None or not flow.config.deep_text else text_BJE.clone()
        num_frames, tokens = x_BTHWC.shape[1], x_BTHWC.shape[2] * x_BTHWC.shape[3]
        parts = x_BTHWC.split(max(1, CHUNK_TOKENS // tokens), dim=1)
        u_BTHWC = torch.cat([flow.shallow_stack(part)[0] for part in parts], dim=1)
        slope_BTHWC = torch.zeros_like(u_BTHWC)
        for start, new, end in checked_windows(windows, num_frames):
            slope = _deep_slope(flow, u_BTHWC[:, start:end], text_BJE, new - start)
            slope_BTHWC[:, start:end] += slope
        slopes = [
            _shallow_slope(flow, part, slope)
            for part, slope in zip(parts, slope_BTHWC.split(parts[0].shape[1], dim=1), strict=True)
        ]
        slope_BTCHW = unpatchify(torch.cat(slopes, dim=1), flow.config.patch_size)
        return -slope_BTCHW.reshape(x.shape)


def tweedie(
    flow: DeepShallowFlow,
    x_noisy: Tensor,
    text_BJE: Tensor | None = None,
    *,
    windows: Sequence[ContextWindow] | None = None,
) -> Tensor:
    """The mean of the clean latents given the noisy ones, by Tweedie's formula.

        x = x_noisy + σ² ∇ log p(x_noisy)

    It is exact where the flow's density is that of the noisy data; σ is the model's `noise_std`.
    Arguments are those of `score`.
    """
    return x_noisy + flow.config.noise_std**2 * score(flow, x_noisy, text_BJE, windows=windows)


@torch.enable_grad()
def _deep_slope(
    flow: DeepShallowFlow, u_BTHWC: Tensor, text_BJE: Tensor | None, known_frames: int
) -> Tensor:
    """Gradient in u of the deep block's ½z² - log|det|, summed over frames after the known ones."""
    block, (num_frames, rows, columns) = flow.deep, u_BTHWC.shape[1:4]
    u_BTHWC = u_BTHWC.detach().clone().requires_grad_()
    s_BLC = frame_sequence(u_BTHWC, flow.deep_reversed)
    rope = flow.deep_rope((rows, columns), num_frames, text_BJE)
    h_BLM, text_len = block.read(s_BLC, text_BJE)
    for layer in block.layers:
        h_BLM = checkpoint(layer, h_BLM, rope, use_reentrant=False, preserve_rng_state=False)
    mu, sigma = block.affine(h_BLM[:, text_len:])
    loss_BLC = 0.5 * ((s_BLC - mu) / sigma).square() + sigma.log()
    total = loss_BLC[:, known_frames * rows * columns :].sum()
    return torch.autograd.grad(total, u_BTHWC)[0]


@torch.enable_grad()
def _shallow_slope(flow: DeepShallowFlow, x_BTHWC: Tensor, slope_BTHWC: Tensor) -> Tensor:
    """Gradient in the tokens x of the whole loss, given these frames' gradient in u."""
    x_BTHWC = x_BTHWC.detach().requires_grad_()
    u_BTHWC, log_det = flow.shallow_stack(x_BTHWC)
    total = (u_BTHWC * slope_BTHWC).sum() - log_det.sum()
    return torch.autograd.grad(total, x_BTHWC)[0]
