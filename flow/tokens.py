"""Latents to tokens and back, and tokens in the order of a block. Knows nothing else.

One convention for all of `flow`:

- Latents are [B, T, C, h, w]: C channels of a latent cell, h rows and w columns of cells.
- Tokens are [B, T, H, W, C]: a token is a square of p x p cells, so H = h/p, W = w/p, and it has
  p·p times the channels of a cell, in the order row in patch, column in patch, channel.
- *Raster order* is frame, row, column. A block reads its frames in raster order or from the end.

Released models have p = 1: a token is a cell. N = H·W tokens are a frame.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x_BTCHW: Tensor, patch_size: int) -> Tensor:
    """Tokens [B, T, H, W, p·p·C] of latents [B, T, C, h, w].

    >>> import torch
    >>> patchify(torch.zeros(1, 2, 4, 6, 8), patch_size=2).shape
    torch.Size([1, 2, 3, 4, 16])
    """
    p = patch_size
    return rearrange(x_BTCHW, "b t c (h p) (w q) -> b t h w (p q c)", p=p, q=p)


def unpatchify(u_BTHWC: Tensor, patch_size: int) -> Tensor:
    """Latents [B, T, C, h, w] of tokens: the inverse of `patchify`."""
    p = patch_size
    return rearrange(u_BTHWC, "b t h w (p q c) -> b t c (h p) (w q)", p=p, q=p)


def block_order(u_BTHWC: Tensor, flipped: bool) -> Tensor:
    """Each frame's tokens in a block's order, [B, T, N, C]: from its last one where `flipped`."""
    u_BTNC = rearrange(u_BTHWC, "b t h w c -> b t (h w) c")
    return u_BTNC.flip(2) if flipped else u_BTNC


def raster_order(u_BTNC: Tensor, grid: tuple[int, int], flipped: bool) -> Tensor:
    """Tokens [B, T, H, W, C] of frames in a block's order: the inverse of `block_order`."""
    u_BTNC = u_BTNC.flip(2) if flipped else u_BTNC
    return rearrange(u_BTNC, "b t (h w) c -> b t h w c", h=grid[0])


def frame_sequence(u_BTHWC: Tensor, flipped: bool) -> Tensor:
    """One sequence [B, T·N, C] of all frames, in time order; inside a frame as `block_order`.

    >>> import torch
    >>> frame_sequence(torch.arange(4.0).view(1, 2, 1, 2, 1), flipped=True).flatten().tolist()
    [1.0, 0.0, 3.0, 2.0]
    """
    return rearrange(block_order(u_BTHWC, flipped), "b t n c -> b (t n) c")
