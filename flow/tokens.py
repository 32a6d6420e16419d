"""Latents to tokens and back, and tokens in the order of a sequence. Knows nothing else.

Shapes: latents [B,T,C,h,w]; tokens [B,T,H,W,p·p·C] with H = h/p, W = w/p; inside a token: row in patch, column
in patch, channel.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x_BTCHW: Tensor, patch_size: int) -> Tensor:
    """Latents -> tokens [B, T, H, W, p·p·C] in raster layout."""
    p = patch_size
    return rearrange(x_BTCHW, "b t c (h p) (w q) -> b t h w (p q c)", p=p, q=p)


def unpatchify(u_BTHWC: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`."""
    p = patch_size
    return rearrange(u_BTHWC, "b t h w (p q c) -> b t c (h p) (w q)", p=p, q=p)


def frame_sequence(u_BTHWC: Tensor, flipped: bool) -> Tensor:
    """Frames of tokens -> one sequence [B, T·N, C] in time order, each frame from its end where flipped."""
    u_BTNC = rearrange(u_BTHWC, "b t h w c -> b t (h w) c")
    return rearrange(u_BTNC.flip(2) if flipped else u_BTNC, "b t n c -> b (t n) c")
