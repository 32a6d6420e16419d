"""The score ∇ log p of a flow, and denoising by it: one forward and one backward, no network of its own.

The baseline that the paper holds its learned denoiser against (arXiv 2511.20462, ablation of denoisers; DESIGN
section 3). Knows the flow and whole clips. Does not know streams: the gradient of later frames' density reaches
earlier ones, so nothing is final before the last frame is there.

Shapes: B batch, T latent frames, H, W tokens, C numbers per token, J text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flow.flow import DeepShallowFlow
from flow.likelihood import CHUNK_TOKENS, FrameWindow, checked_windows
from flow.tokens import frame_sequence, unpatchify


def score(
    flow: DeepShallowFlow,
    x: Tensor,
    text_BJE: Tensor | None = None,
    *,
    windows: Sequence[FrameWindow] | None = None,
) -> Tensor:
    """∇ₓ log p(x | text), of the shape of latents x [B,T,C,h,w] (images: [B,C,h,w] too), fp32 or wider.

    Memory: the deep block's layers are recomputed in the backward one by one, shallow blocks a few frames at a time.
    windows: as in `flow.likelihood.likelihood`. Parameters get no gradients. For unsharded weights.
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
    windows: Sequence[FrameWindow] | None = None,
) -> Tensor:
    """The mean of the clean latents given the noisy ones, x_noisy + σ² ∇ log p(x_noisy) (Tweedie's formula).

    Exact where the flow's density is that of the noisy data; σ is the model's `noise_std`.
    """
    return x_noisy + flow.config.noise_std**2 * score(flow, x_noisy, text_BJE, windows=windows)


@torch.enable_grad()
def _deep_slope(
    flow: DeepShallowFlow, u_BTHWC: Tensor, text_BJE: Tensor | None, known_frames: int
) -> Tensor:
    """Gradient in u of the deep block's ½z² - log|det|, summed over the frames after the known ones."""
    block, (num_frames, rows, columns) = flow.deep, u_BTHWC.shape[1:4]
    u_BTHWC = u_BTHWC.detach().clone().requires_grad_()
    s_BLC = frame_sequence(u_BTHWC, flow.deep_reversed)
    rope = flow.deep_rope((rows, columns), num_frames, text_BJE)
    h_BLW, text_len = block.read(s_BLC, text_BJE)
    for layer in block.layers:
        h_BLW = checkpoint(layer, h_BLW, rope, use_reentrant=False, preserve_rng_state=False)
    mu, sigma = block.affine(h_BLW[:, text_len:])
    loss_BLC = 0.5 * ((s_BLC - mu) / sigma).square() + sigma.log()
    total = loss_BLC[:, known_frames * rows * columns :].sum()
    return torch.autograd.grad(total, u_BTHWC)[0]


@torch.enable_grad()
def _shallow_slope(flow: DeepShallowFlow, x_BTHWC: Tensor, slope_BTHWC: Tensor) -> Tensor:
    """Gradient in the tokens x of the whole loss, given the deep block's gradient in u of these frames."""
    x_BTHWC = x_BTHWC.detach().requires_grad_()
    u_BTHWC, log_det = flow.shallow_stack(x_BTHWC)
    total = (u_BTHWC * slope_BTHWC).sum() - log_det.sum()
    return torch.autograd.grad(total, x_BTHWC)[0]
