"""Transformer layers and the three ways they attend: causal, frame-windowed, and from a cache.

Knows a sequence, its rotary turns and who may see whom. Knows nothing of flows, text or orders. No
mask of sequence × sequence is ever made: each way is a set of dense or causal products.

Shapes: B batch, L places of this call, S places in all, H heads, D head_dim, M model width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

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
    q, k, v = _for_kernel(q_BHLD, k_BHSD, v_BHSD)
    return _kernel(q, k, v, is_causal).to(v_BHSD.dtype)


def _for_kernel(*qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values in the dtype that `attend` takes their gradients in."""
    if qkv[-1].device.type != "cpu" or not torch.is_grad_enabled():
        return qkv
    return tuple(x.float() if qkv[-1].dtype == torch.bfloat16 else x for x in qkv)


def _kernel(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, is_causal: bool = False) -> Tensor:
    if v_BHSD.device.type == "cpu" and v_BHSD.dtype == torch.float32:
        # Autocast would make bf16 of them again.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, is_causal=is_causal)
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, is_causal=is_causal)


def attend_frames(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, reach: FrameReach, *, rejoin: bool = True
) -> Tensor:
    """Frame-windowed attention over a whole clip, one dense product per frame -> [B, H, S, D].

    Keys of a window are copied to lie beside the text's. For the backward pass they are copied
    again (`rejoin`): kept, the copies of a clip of 21 frames would be ten times the keys. Where
    checkpointing computes all of it again, nothing is kept anyhow.
    """
    dtype, num_frames = v_BHSD.dtype, (q_BHSD.shape[2] - reach.text) // reach.tokens
    q, k, v = _for_kernel(q_BHSD, k_BHSD, v_BHSD)
    out = []
    for queries, keys in _key_ranges(reach, num_frames):
        if keys.start <= reach.text:
            # Text and the frames it sees lie side by side: a slice, and no copy.
            part = _kernel(q[:, :, queries], k[:, :, : keys.stop], v[:, :, : keys.stop])
        else:
            part = _attend_window(q[:, :, queries], k, v, slice(0, reach.text), keys, rejoin)
        out.append(part.to(dtype))
    return torch.cat(out, dim=2)


def _attend_window(
    q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, text: slice, frames: slice, rejoin: bool
) -> Tensor:
    """Attention over two ranges of places; with `rejoin` no graph keeps them joined."""

    def join(kv_BHSD: Tensor) -> Tensor:
        return torch.cat([kv_BHSD[:, :, text], kv_BHSD[:, :, frames]], dim=2)

    k, v = join(k_BHSD), join(v_BHSD)
    # The compiler plans by itself what it keeps.
    if not rejoin or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _kernel(q_BHLD, k, v)
    sources = (k_BHSD.detach(), v_BHSD.detach())
    places = {k.data_ptr(): 0, v.data_ptr(): 1}

    def pack(saved: Tensor) -> Tensor | int:
        number = places.get(saved.data_ptr())
        return saved if number is None or saved.shape != shape else number

    def unpack(packed: Tensor | int) -> Tensor:
        return join(sources[packed]) if isinstance(packed, int) else packed

    shape = k.shape
    with saved_tensors_hooks(pack, unpack):
        return _kernel(q_BHLD, k, v)


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

    def forward(
        self, h_BLM: Tensor, rope: Rope, reach: FrameReach | None = None, *, rejoin: bool = True
    ) -> Tensor:
        """Attention over the whole sequence: causal, or by frames where `reach` says so."""
        q, k, v = self.project(h_BLM, rope)
        return self.merge(self.mix(q, k, v, reach, rejoin=rejoin))

    @staticmethod
    def mix(
        q: Tensor, k: Tensor, v: Tensor, reach: FrameReach | None, *, rejoin: bool = True
    ) -> Tensor:
        """What every place takes from the places that it sees, [B, H, L, D]."""
        if reach is None:
            return attend(q, k, v, is_causal=True)
        return attend_frames(q, k, v, reach, rejoin=rejoin)

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


Recompute = Literal["none", "selective", "full"]
"""What a layer computes again in its backward pass."""


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, of which the arguments alone are kept for the backward pass."""
    # Nothing here is random, so there is no state of it to keep.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class TransformerLayer(nn.Module):
    """One pre-norm layer: h += attention(norm(h)); h += mlp(norm(h)).

    It is the unit that is sharded, compiled and checkpointed: with `recompute`, its backward pass
    computes again what its forward pass then need not keep. "full" keeps h alone; "selective" keeps
    what attention reads and gives too, so that only what costs the length of the sequence is
    computed twice, and not what costs its square.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.attention = Attention(width, head_dim)
        self.mlp = MLP(width)

    def forward(self, h_BLM: Tensor, rope: Rope, reach: FrameReach | None = None) -> Tensor:
        """The whole sequence: causal, or by frames where `reach` says so."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._whole(h_BLM, rope, reach)
        if self.recompute == "full":
            return _recomputed(self._whole, h_BLM, rope, reach, False)
        q, k, v = _recomputed(self._project, h_BLM, rope)
        return _recomputed(self._after, h_BLM, self.attention.mix(q, k, v, reach))

    def _whole(
        self, h_BLM: Tensor, rope: Rope, reach: FrameReach | None, rejoin: bool = True
    ) -> Tensor:
        h_BLM = h_BLM + self.attention(h_BLM, rope, reach, rejoin=rejoin)
        return h_BLM + self.mlp(h_BLM)

    def _project(self, h_BLM: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.attention.project(h_BLM, rope)
        # As a view, it would keep the queries and keys before they were turned as well.
        return q, k, v.clone()

    def _after(self, h_BLM: Tensor, out_BHLD: Tensor) -> Tensor:
        """The layer from what its attention gave."""
        h_BLM = h_BLM + self.attention.merge(out_BHLD)
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


class ZeroLinear(nn.Linear):
    """A network's last product, which starts at zero: a fresh network changes nothing."""

    def reset_parameters(self) -> None:
        """Start with zeros."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


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
