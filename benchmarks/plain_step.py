"""A training step written down as plainly as its equations: what ours is measured against.

Masks of sequence × sequence, rotations in real numbers, one optimizer's loop over parameters, one
pass of the flow whose input gradient is the denoiser's target. Works on the weights of a
`FlowModel`, so that both must give one loss. Knows the equations. Knows nothing of shards.

Shapes: B batch, L places, H heads, D head_dim, C channels of a token, J text tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flow.attention import FrameReach, TransformerLayer
from flow.block import SOFTPLUS_SHIFT, AffineBlock
from flow.flow import DENOISE_STEP, FlowModel
from training.data.batches import TrainBatch

ROTARY_BASE = 10000.0
TIME = 8
Turns = tuple[Tensor, Tensor]


@lru_cache(maxsize=16)
def turns(
    head_dim: int, pos_len: float, grid: tuple[int, int], frames: int, text: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D/2] of rows, columns and time of text places and then of tokens."""
    rows, columns = grid
    side, spatial = math.sqrt(rows * columns), head_dim // 2 - TIME
    space = ROTARY_BASE ** (-2 * torch.arange(spatial // 2) / spatial)
    time = ROTARY_BASE ** (-torch.arange(TIME) / TIME)
    places = [(0.0, 0.0, j / text * pos_len) for j in range(text)]
    places += [
        (row / side * pos_len, column / side * pos_len, float(frame))
        for frame in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    row, column, when = torch.tensor(places).unbind(1)
    angles_LA = torch.cat(
        [row[:, None] * space, column[:, None] * space, when[:, None] * time], dim=1
    )
    return angles_LA.cos(), angles_LA.sin()


def rotated(x_BHLD: Tensor, turns_LA: Turns) -> Tensor:
    even, odd = x_BHLD[..., 0::2], x_BHLD[..., 1::2]
    cos, sin = turns_LA
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def layer(h: Tensor, of: TransformerLayer, turns_LA: Turns, mask: Tensor, head_dim: int) -> Tensor:
    """One pre-norm layer; `mask` [L, L] is true where a query sees a key."""
    attention, mlp = of.attention, of.mlp
    q, k, v = attention.qkv(attention.norm(h)).chunk(3, dim=-1)
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    q, k = rotated(q, turns_LA), rotated(k, turns_LA)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    h = h + attention.proj(out.transpose(1, 2).flatten(2))
    return h + mlp.down(F.gelu(mlp.up(mlp.norm(h))))


@lru_cache(maxsize=16)
def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@lru_cache(maxsize=16)
def in_reach(reach: FrameReach, frames: int) -> Tensor:
    """Who sees whom in a layer of the denoiser, [L, L]."""
    frame = torch.cat(
        [torch.full((reach.text,), -1), torch.arange(frames * reach.tokens) // reach.tokens]
    )
    is_text, apart = frame < 0, frame[:, None] - frame[None, :]
    sees = (apart < reach.window) & (apart >= -reach.ahead)
    sees = torch.where(is_text[:, None], frame[None, :] < reach.text_frames, sees)
    return sees | is_text[None, :]


def gain_norm(h: Tensor, weight: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def block(
    s_BLC: Tensor, of: AffineBlock, turns_LA: Turns, head_dim: int, text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """z and log|det| of one affine block."""
    h = of.proj_in(torch.cat([of.sos.expand(len(s_BLC), -1, -1), s_BLC[:, :-1]], dim=1))
    words = 0
    if text is not None:
        assert of.proj_txt is not None
        words = text.shape[1]
        h = torch.cat([of.proj_txt(text), h], dim=1)
    mask = causal(h.shape[1])
    for one in of.layers:
        assert isinstance(one, TransformerLayer)
        h = layer(h, one, turns_LA, mask, head_dim)
    h = h[:, words:]
    if of.final_norm is not None:
        h = gain_norm(h, of.final_norm.weight)
    out = of.proj_out(h)
    if of.soft_clip:
        out = of.soft_clip * torch.tanh(out / of.soft_clip)
    a, mu = out.chunk(2, dim=-1)
    sigma = F.softplus(a + SOFTPLUS_SHIFT) if of.softplus else a.exp()
    return (s_BLC - mu) / sigma, -sigma.log()


def flow_loss(model: FlowModel, x: Tensor, text: Tensor) -> Tensor:
    """Mean of ½z² − log|det| of latents [B, T, C, h, w] whose tokens are single cells."""
    config, flow = model.config, model.flow
    frames, _, rows, columns = x.shape[1:]
    shape = (config.head_dim, config.pos_len)
    u = x.permute(0, 1, 3, 4, 2).flatten(2, 3)
    total = torch.zeros_like(u)
    for index, one in enumerate([*flow.shallow, flow.deep]):
        flip = config.reversed_order(index)
        s = u.flip(2) if flip else u
        if index < len(flow.shallow):
            where = turns(*shape, (rows, columns), 1, 0)
            z, log_det = block(s.flatten(0, 1), one, where, config.head_dim, None)
        else:
            where = turns(*shape, (rows, columns), frames, text.shape[1])
            z, log_det = block(s.flatten(1, 2), one, where, config.head_dim, text)
        z, log_det = z.reshape_as(s), log_det.reshape_as(s)
        u = z.flip(2) if flip else z
        total = total + (log_det.flip(2) if flip else log_det)
    return (0.5 * u.square() - total).mean()


def denoised(model: FlowModel, x: Tensor, text: Tensor) -> Tensor:
    """The denoiser's s, of x's shape."""
    config, of = model.config, model.denoiser
    assert of is not None
    assert of.proj_txt is not None
    frames, _, rows, columns = x.shape[1:]
    words, tokens = text.shape[1], rows * columns
    u = x.permute(0, 1, 3, 4, 2).flatten(1, 3)
    h = torch.cat([of.proj_txt(text), of.proj_in(u)], dim=1)
    where = turns(config.head_dim, config.pos_len, (rows, columns), frames, words)
    for index, one in enumerate(of.layers):
        assert isinstance(one, TransformerLayer)
        mask = in_reach(of.reach(index, words, tokens), frames)
        h = layer(h, one, where, mask, config.head_dim)
    h = h[:, words:]
    if of.final_norm is not None:
        h = gain_norm(h, of.final_norm.weight)
    return of.proj_out(h).unflatten(1, (frames, rows, columns)).permute(0, 1, 4, 2, 3)


class PlainStep:
    """Both losses of a step, their gradients, clipping, AdamW and averaged weights."""

    def __init__(self, model: FlowModel, learning_rate: float, ema_decay: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.average = [p.detach().clone() for p in model.parameters()]
        self.ema_decay = ema_decay

    def take(self, batch: TrainBatch) -> tuple[float, float]:
        """One step; the losses of flow and denoiser before it."""
        model, sigma = self.model, self.model.config.noise_std
        assert model.denoiser is not None
        x = batch.x_noisy.clone().requires_grad_()
        loss = flow_loss(model, x, batch.text_BJE)
        (loss * (sigma / DENOISE_STEP)).backward()
        assert x.grad is not None
        target = x.grad * (x.numel() * sigma)
        fit = (denoised(model, batch.x_noisy, batch.text_BJE) - target).square().mean()
        fit.backward()
        for part in (model.flow, model.denoiser):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for kept, parameter in zip(self.average, model.parameters(), strict=True):
                kept.mul_(self.ema_decay).add_(parameter, alpha=1 - self.ema_decay)
        return loss.item(), fit.item()
