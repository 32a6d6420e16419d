"""Transformer layers and the three ways they attend: causal, frame-windowed, and from a cache.

Knows a sequence, its rotary turns and who may see whom. Knows nothing of flows, text or orders. No
mask of sequence × sequence is ever made: each way is a set of dense or causal products.

Shapes: B batch, L places of this call, S places in all, H heads, D head_dim, M model width.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from flow.rope import Rope


@dataclass(frozen=True)
class FrameReach:
    """Who sees whom in a sequence of text places followed by frames of tokens.

    Every query sees all text. A token of frame f sees frames f + 1 - window .. f + ahead; a text
    query sees the first `text_frames` frames.

    >>> FrameReach(text=2, tokens=6, window=3, ahead=1, text_frames=0).frames_seen(4, num_frames=9)
    range(2, 6)
    """

    text: int
    """Text places."""
    tokens: int
    """Tokens of a frame."""
    window: int
    """Frames that a token sees up to its own, that one included."""
    ahead: int
    """Frames that a token sees after its own."""
    text_frames: int
    """First frames that a text place sees."""

    def frames_seen(self, frame: int, num_frames: int) -> range:
        """Frames that a token of `frame` sees in a clip of `num_frames`."""
        return range(max(0, frame + 1 - self.window), min(num_frames, frame + 1 + self.ahead))


@lru_cache(maxsize=64)
def _key_ranges(reach: FrameReach, num_frames: int) -> list[tuple[slice, slice]]:
    """(queries, frame keys) slices over places; neighbouring queries with the same keys are joined.

    Joined, an unmasked clip is one product instead of one per frame.
    """
    ranges = [(0, reach.text, 0, min(reach.text_frames, num_frames))] if reach.text else []
    for frame in range(num_frames):
        frames = reach.frames_seen(frame, num_frames)
        start = reach.text + frame * reach.tokens
        ranges.append((start, start + reach.tokens, frames.start, frames.stop))
    joined: list[tuple[int, int, int, int]] = []
    for start, stop, low, high in ranges:
        if joined and joined[-1][2:] == (low, high):
            joined[-1] = (joined[-1][0], stop, low, high)
        else:
            joined.append((start, stop, low, high))
    return [
        (
            slice(start, stop),
            slice(reach.text + low * reach.tokens, reach.text + high * reach.tokens),
        )
        for start, stop, low, high in joined
    ]


def attend(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, is_causal: bool = False) -> Tensor:
    """Attention [B, H, L, D], over all S places or, where L = S, causal.

    On a CPU the backward pass of torch's kernel is four times slower in bf16 than in fp32 for
    sequences of 100 places (`python -m benchmarks.training_step`): there, gradients are taken in
    fp32.
    """
    dtype, is_cpu = v_BHSD.dtype, v_BHSD.device.type == "cpu"
    if is_cpu and dtype == torch.bfloat16 and torch.is_grad_enabled():
        q, k, v = (x.float() for x in (q_BHLD, k_BHSD, v_BHSD))
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).to(dtype)
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, is_causal=is_causal)


def attend_frames(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, reach: FrameReach) -> Tensor:
    """Frame-windowed attention over a whole clip, one dense product per frame -> [B, H, S, D]."""
    num_frames = (q_BHSD.shape[2] - reach.text) // reach.tokens
    out = []
    for queries, keys in _key_ranges(reach, num_frames):
        if keys.start <= reach.text:
            # Text and the frames it sees lie side by side: a slice, and no copy.
            k, v = k_BHSD[:, :, : keys.stop], v_BHSD[:, :, : keys.stop]
        else:
            k, v = (
                torch.cat([kv[:, :, : reach.text], kv[:, :, keys]], dim=2)
                for kv in (k_BHSD, v_BHSD)
            )
        out.append(attend(q_BHSD[:, :, queries], k, v))
    return torch.cat(out, dim=2)


def attend_last(
    q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention [B, H, L, D] where the L queries are the last L of the S places.

    Accelerators take the causal rule as such. The CPU kernel knows only the square one, so there
    the L rows of the mask are made, once for all layers of a pass. The scale is D^-0.5 by default.
    """
    length, places = q_BHLD.shape[2], k_BHSD.shape[2]
    if length in (1, places):
        return F.scaled_dot_product_attention(
            q_BHLD, k_BHSD, v_BHSD, is_causal=length > 1, scale=scale
        )
    if q_BHLD.device.type == "cpu":
        mask = _last_rows(length, places, q_BHLD.dtype)
    else:
        mask = causal_lower_right(length, places)
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=mask, scale=scale)


@lru_cache(maxsize=4)
def _last_rows(length: int, places: int, dtype: torch.dtype) -> Tensor:
    # The cache outlives the call: an inference tensor could not take part in a backward pass later.
    with torch.inference_mode(False):
        return torch.full((length, places), float("-inf"), dtype=dtype).triu(places - length + 1)


class LayerCache:
    """Rotated keys and values of one layer, allocated once in the compute dtype.

    `kv_2BHSD` is one tensor, so that both are written by one copy; `k_BHSD` and `v_BHSD` are its
    halves. Keys are rotated once, when they are written.
    """

    def __init__(self, batch: int, layer: TransformerLayer, places: int) -> None:
        attention = layer.attention
        like = attention.qkv.weight
        self.batch = batch
        shape = (2, batch, attention.heads, places, attention.head_dim)
        self.kv_2BHSD = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.k_BHSD, self.v_BHSD = self.kv_2BHSD

    def write(self, place: int, k_BHLD: Tensor, v_BHLD: Tensor) -> None:
        """Put keys and values at places place .. place + L - 1."""
        stop = place + k_BHLD.shape[2]
        self.k_BHSD[:, :, place:stop] = k_BHLD
        self.v_BHSD[:, :, place:stop] = v_BHLD


class Attention(nn.Module):
    """Pre-norm multi-head attention of `width` / `head_dim` heads.

    One product with bias makes queries, keys and values, in this order, as the released weights
    have it. The scale is head_dim^-0.5. Source: `docs/design.md`, "The model exactly".
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim, self.heads = head_dim, width // head_dim
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, h_BLM: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both turned) and values, each [B, H, L, D]."""
        qkv = self.qkv(self.norm(h_BLM)).unflatten(-1, (3, self.heads, self.head_dim))
        qk, v = qkv.split((2, 1), dim=2)
        q, k = rope.rotate(qk).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).transpose(1, 2)

    def merge(self, out_BHLD: Tensor) -> Tensor:
        """Heads joined and projected, [B, L, M]."""
        return self.proj(rearrange(out_BHLD, "b h l d -> b l (h d)"))

    def forward(self, h_BLM: Tensor, rope: Rope, reach: FrameReach | None = None) -> Tensor:
        """Attention over the whole sequence: causal, or by frames where `reach` says so."""
        q, k, v = self.project(h_BLM, rope)
        if reach is None:
            return self.merge(attend(q, k, v, is_causal=True))
        return self.merge(attend_frames(q, k, v, reach))

    def extend(self, h_BLM: Tensor, rope: Rope, cache: LayerCache, place: int) -> Tensor:
        """Causal attention of places place .. place + L - 1 over themselves and all before."""
        q, k, v = self.project(h_BLM, rope)
        cache.write(place, k, v)
        stop = place + h_BLM.shape[1]
        return self.merge(attend_last(q, cache.k_BHSD[:, :, :stop], cache.v_BHSD[:, :, :stop]))


class MLP(nn.Module):
    """Pre-norm width -> 4 width -> width with exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h_BLM: Tensor) -> Tensor:
        """The layer's addition to h, [B, L, M]."""
        return self.down(F.gelu(self.up(self.norm(h_BLM))))


class TransformerLayer(nn.Module):
    """One pre-norm layer: h += attention(norm(h)); h += mlp(norm(h)).

    It is the unit that is sharded, compiled and checkpointed.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width)

    def forward(self, h_BLM: Tensor, rope: Rope, reach: FrameReach | None = None) -> Tensor:
        """The whole sequence: causal, or by frames where `reach` says so."""
        h_BLM = h_BLM + self.attention(h_BLM, rope, reach)
        return h_BLM + self.mlp(h_BLM)

    def extend(self, h_BLM: Tensor, rope: Rope, cache: LayerCache, place: int) -> Tensor:
        """Places place .. place + L - 1 of a causal sequence whose past is in `cache`.

        Their keys and values are written there, over what was at those places.
        """
        h_BLM = h_BLM + self.attention.extend(h_BLM, rope, cache, place)
        return h_BLM + self.mlp(h_BLM)


RMS_EPSILON = 1e-6
"""Added to the mean square of a final norm."""


class GainNorm(nn.Module):
    """RMSNorm in fp32 (or wider) whose gain is 1 + weight, as in the released weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        """Start with a gain of 1."""
        nn.init.zeros_(self.weight)

    def forward(self, h_BLM: Tensor) -> Tensor:
        """h divided by its root mean square, times the gain, in the dtype of h."""
        wide = h_BLM.to(torch.promote_types(h_BLM.dtype, torch.float32))
        gain = 1 + self.weight.to(wide.dtype)
        return (F.rms_norm(wide, wide.shape[-1:], eps=RMS_EPSILON) * gain).to(h_BLM.dtype)


def project_out(h_BLM: Tensor, norm: GainNorm | None, proj: nn.Linear) -> Tensor:
    """A network's last product, in the dtype of its own weights even where autocast is on.

    Under bf16 with fp32 masters that is fp32: rounded to bf16, this one product would make most of
    the error of the loss and half that of its gradients.
    """
    device = h_BLM.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if is_cast else nullcontext():
        h_BLM = h_BLM.to(proj.weight.dtype)
        return proj(h_BLM if norm is None else norm(h_BLM))
