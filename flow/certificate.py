"""How exact a sample is: the noise that would have given it exactly, against the noise asked for.

Knows the deep block's parallel forward, and a sample's noise and context windows. How the sample
was made does not matter.

Shapes: B batch, T latent frames, H, W tokens, L tokens of a context window, C channels, J text
tokens, E text width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.flow import DeepShallowFlow
from flow.guidance import guide_pair
from flow.sample_spec import SampleSpec
from flow.sampling import Noise, frame_noise
from flow.tokens import frame_sequence, patchify


@dataclass(frozen=True)
class Certificate:
    """How far the noise behind a sample is from the noise asked for, over all made elements.

        r = (u - mu) / sigma - z

    u is the exact sample of noise z + r: a backward error, in standard deviations of the prior. It
    is taken before the shallow inverse and the denoiser. Source: `docs/design.md`, "Sampling".
    """

    max_abs: float
    """Largest |r|."""
    p999_abs: float
    """The 99.9th percentile of |r|."""
    num_elements: int
    """Elements that were made."""


@torch.no_grad()
def certificate(
    flow: DeepShallowFlow,
    u_BTHWC: Tensor,
    text_BJE: Tensor | None,
    null_BJE: Tensor | None,
    spec: SampleSpec,
    *,
    given_frames: int = 0,
    noise: Noise | None = None,
) -> Certificate:
    """One parallel guided forward of the deep block over each context window of a sampled video.

    Args:
        flow: the flow that made it.
        u_BTHWC: its intermediate latents, as `DeepStream` gives them.
        text_BJE, null_BJE: what the deep block read; null_BJE only with guidance.
        spec: how it was sampled; only seed, size, guidance and context windows are read.
        given_frames: leading frames that were given, not made.
        noise: prior noise by frame, where it was not that of `spec.seed`.

    >>> from flow.config import tiny
    >>> from flow.sampling import DeepStream
    >>> flow = DeepShallowFlow(tiny())
    >>> spec = SampleSpec(num_frames=2, grid=(2, 2), tolerance=0.0)
    >>> stream = DeepStream(flow, None, None, spec)
    >>> u_BTHWC = torch.cat([stream.next_frame(), stream.next_frame()], dim=1)
    >>> certificate(flow, u_BTHWC, None, None, spec).max_abs < 1e-5
    True
    """
    shape = (flow.config.latent_channels, *spec.grid)
    noise = noise or (lambda n: frame_noise(spec.seed, n, shape).unsqueeze(0))
    residuals = []
    for start, new, end in spec.context_windows():
        new = max(new, given_frames)
        if new >= end:
            continue
        mu, sigma = _guided_forward(flow, u_BTHWC[:, start:end], text_BJE, null_BJE, spec.guidance)
        u_BLC = frame_sequence(u_BTHWC[:, start:end], flow.deep_reversed).to(mu)
        z = torch.stack([noise(n) for n in range(new, end)], dim=1)
        z_BLC = frame_sequence(patchify(z, flow.config.patch_size), flow.deep_reversed).to(mu)
        num_new = z_BLC.shape[1]
        residuals.append(((u_BLC - mu) / sigma)[:, -num_new:] - z_BLC)
    r = torch.cat([residual.flatten() for residual in residuals]).abs().double()
    rank = max(1, math.ceil(0.999 * r.numel()))
    return Certificate(float(r.max()), float(r.kthvalue(rank).values), r.numel())


def _guided_forward(
    flow: DeepShallowFlow,
    u_BTHWC: Tensor,
    text_BJE: Tensor | None,
    null_BJE: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """mu and sigma [B, L, C] of every token of a context window, from its true predecessors."""
    s_BLC = frame_sequence(u_BTHWC, flow.deep_reversed)
    grid = (u_BTHWC.shape[2], u_BTHWC.shape[3])
    text_BJE = text_BJE if flow.config.deep_text else None
    rope = flow.deep_rope(grid, u_BTHWC.shape[1], text_BJE)
    if guidance <= 0 or text_BJE is None or null_BJE is None:
        return flow.deep.predict(s_BLC, rope, text_BJE)
    pair = flow.deep.predict(torch.cat([s_BLC, s_BLC]), rope, torch.cat([text_BJE, null_BJE]))
    return guide_pair(*pair, guidance)
