"""One block's pass over new places for CPU inference: weights repacked for oneDNN, buffers and mask made once.

The same numbers as `AffineBlock.embed`, its layers' `extend` and `affine` up to rounding. The stock product packs its weight anew
at every call and, on AMD processors, runs at half their vector width; with weights packed once, 80 rows take half the time. A pass
is some hundred small operations, so those that are not products are few and write in place.
Knows one block and its caches. Does not know guidance, solvers or frames.

Shapes: B batch, L places of this call, S places in all, H heads, D head_dim, W width, C numbers per token, R = B L rows,
P = B H pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flow.attention import RMS_EPSILON, LayerCache, TransformerLayer, attend_last
from flow.block import SOFTPLUS_SHIFT, AffineBlock
from flow.rope import Rope

SCORES_MAX = 2**23
"""Numbers of attention scores (32 MB) up to which they are made whole: two products and a softmax on all threads beat
the fused kernel, which shares out 32 queries at a time. Beyond, memory traffic decides and the fused kernel wins."""


def can_pack(block: AffineBlock) -> bool:
    """Whether this build of torch has the packed product for this block: fp32 on a CPU."""
    weight = block.proj_in.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


class _Linear:
    """x @ weight.T + bias, packed for about `rows` rows; correct for any number of them."""

    def __init__(self, weight: Tensor, bias: Tensor, rows: int, gelu: bool = False) -> None:
        self.bias = bias.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.after: tuple[str, list[float], str] = (
            ("gelu", [], "none") if gelu else ("none", [], "")
        )
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias, *self.after)


class _Norm:
    """A layer norm without its module's hooks, which cost as much as the norm at this size."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class _Pass(NamedTuple):
    """What all layers of one pass share."""

    place: int
    turn_L1A: Tensor
    """Turns of queries and keys, complex."""
    future_LL: Tensor
    """-inf above the diagonal."""
    scores_PLS: Tensor | None
    """Room for the scores of all heads; None where they would be too many."""
    new_PLL: Tensor | None
    """The part of them between the new places."""


class _Attend:
    """Causal attention of new places over one layer's cache, which it writes."""

    def __init__(self, cache: LayerCache) -> None:
        self.kv_2BHSD = cache.kv_2BHSD
        self.batch = cache.k_BHSD.shape[0]
        # Sequences and heads as one axis, for the batched product.
        self.k_PDS, self.v_PSD = cache.k_BHSD.flatten(0, 1).mT, cache.v_BHSD.flatten(0, 1)

    def __call__(self, qkv_3BHLD: Tensor, shared: _Pass) -> Tensor:
        """Queries (scaled), keys and values of places place .. place + L - 1 -> [B L, W].

        Half the batch of the cache counts for both its halves.
        """
        _, rows, _, length, _ = qkv_3BHLD.shape
        q_BHLD, kv_2BHLD = qkv_3BHLD[0], qkv_3BHLD[1:]
        written = self.kv_2BHSD.narrow(3, shared.place, length)
        if rows < self.batch:
            q_BHLD = q_BHLD.expand(2, -1, -1, -1, -1).flatten(0, 1)
            written, kv_2BHLD = written.unflatten(1, (2, rows)), kv_2BHLD.unsqueeze(1)
        written.copy_(kv_2BHLD)
        stop = shared.place + length
        if shared.scores_PLS is None or shared.new_PLL is None:
            k, v = self.kv_2BHSD.narrow(3, 0, stop)
            out = attend_last(q_BHLD, k, v, scale=1.0)
        else:
            scores = shared.scores_PLS
            torch.bmm(
                q_BHLD.reshape(len(scores), length, -1), self.k_PDS.narrow(2, 0, stop), out=scores
            )
            shared.new_PLL.add_(shared.future_LL)
            torch.softmax(scores, -1, out=scores)
            out = torch.bmm(scores, self.v_PSD.narrow(1, 0, stop)).view(q_BHLD.shape)
        return out.transpose(1, 2).reshape(self.batch * length, -1)


class _Layer:
    """One transformer layer. The scale of the scores is folded into the product that makes the queries."""

    def __init__(self, layer: TransformerLayer, rows: int) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.norm, self.mlp_norm = _Norm(attention.norm), _Norm(mlp.norm)
        weight, bias = attention.qkv.weight.detach().clone(), attention.qkv.bias.detach().clone()
        for part in (weight, bias):
            part[: self.heads * self.head_dim] *= self.head_dim**-0.5
        self.qkv = _Linear(weight, bias, rows)
        self.proj = _Linear(attention.proj.weight, attention.proj.bias, rows)
        self.up = _Linear(mlp.up.weight, mlp.up.bias, rows, gelu=True)
        self.down = _Linear(mlp.down.weight, mlp.down.bias, rows)

    def extend(self, h_RW: Tensor, attend: _Attend, shared: _Pass) -> Tensor:
        """`TransformerLayer.extend`; a guided pair that came as one, as to the first layer, leaves as two."""
        qkv_R = self.qkv(self.norm(h_RW))
        length = len(shared.turn_L1A)
        qkv_BL3HD = qkv_R.view(-1, length, 3, self.heads, self.head_dim)
        # Queries and keys are turned in place, as complex numbers.
        pairs = torch.view_as_complex(qkv_R.view(-1, length, 3 * self.heads, self.head_dim // 2, 2))
        pairs.narrow(2, 0, 2 * self.heads).mul_(shared.turn_L1A)
        out_RW = self.proj(attend(qkv_BL3HD.permute(2, 0, 3, 1, 4), shared))
        if len(out_RW) == len(h_RW):
            out_RW += h_RW
        else:
            out_RW.view(-1, *h_RW.shape).add_(h_RW)
        return out_RW.add_(self.down(self.up(self.mlp_norm(out_RW))))


class _Weights:
    """A block's layers, input and output products, packed.

    The gain of the final norm and the soft clip's inner factor are folded into the output product.
    """

    def __init__(self, block: AffineBlock, rows: int) -> None:
        self.version = _version(block)
        self.embed = _Linear(block.proj_in.weight, block.proj_in.bias, rows)
        self.layers = [_Layer(layer, rows) for layer in block.layers]  # type: ignore[arg-type]
        self.normed, self.clip, self.softplus = (
            block.final_norm is not None,
            block.soft_clip,
            block.softplus,
        )
        weight, bias = block.proj_out.weight.detach(), block.proj_out.bias.detach()
        if block.final_norm is not None:
            weight = weight * (1 + block.final_norm.weight.detach())
        # What is added after the soft clip: a's shift before its softplus.
        self.shift = torch.zeros_like(bias)
        if self.softplus:
            self.shift[: len(bias) // 2] = SOFTPLUS_SHIFT
        if self.clip > 0:
            # clip tanh(x / clip) = 2 clip sigmoid(2 x / clip) - clip: a sigmoid takes a fifth of a tanh's time.
            weight, bias = weight * (2 / self.clip), bias * (2 / self.clip)
            self.shift -= self.clip
        self.out = _Linear(weight, bias, rows)
        self.epsilon = torch.tensor(RMS_EPSILON)

    def affine(self, h_RW: Tensor) -> tuple[Tensor, Tensor]:
        """`AffineBlock.affine`; overwrites h."""
        if self.normed:
            norm = torch.linalg.vector_norm(h_RW, dim=-1, keepdim=True)
            mean_square = torch.addcmul(self.epsilon, norm, norm, value=1 / h_RW.shape[-1])
            h_RW.mul_(mean_square.rsqrt_())
        out = self.out(h_RW)
        if self.clip > 0:
            out = torch.add(self.shift, out.sigmoid_(), alpha=2 * self.clip)
        elif self.softplus:
            out += self.shift
        a, mu = out.chunk(2, dim=-1)
        return mu, F.softplus(a) if self.softplus else a.exp()


_WEIGHTS: WeakKeyDictionary[AffineBlock, _Weights] = WeakKeyDictionary()


def _version(block: AffineBlock) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight is replaced or written to."""
    return tuple((p.data_ptr(), p._version) for p in block.parameters())


def _weights_of(block: AffineBlock, rows: int) -> _Weights:
    """Packed once per block and kept as long as it lives unchanged."""
    found = _WEIGHTS.get(block)
    if found is None or found.version != _version(block):
        found = _WEIGHTS[block] = _Weights(block, rows)
    return found


class PackedBlock:
    """A block with packed weights writing to `caches`; `rows`: the most places of a call."""

    def __init__(self, block: AffineBlock, caches: Sequence[LayerCache], rows: int) -> None:
        self.batch, self.heads, places = caches[0].k_BHSD.shape[:3]
        self.rows = min(rows, places)
        self.weights = _weights_of(block, self.batch * self.rows)
        size = self.batch * self.heads * self.rows * places
        self._scores = torch.empty(size) if size <= SCORES_MAX else None
        self._attend = [_Attend(cache) for cache in caches]
        self._future = torch.full((self.rows, self.rows), float("-inf")).triu_(1)

    def predict(self, s_BLC: Tensor, rope: Rope, place: int) -> tuple[Tensor, Tensor]:
        """mu and sigma [B, L, C] of the tokens after places place .. place + L - 1 (L at most `rows`), which hold s;
        their keys and values go to the caches. A guided pair's tokens are the same twice: given once, they are doubled.
        """
        length = s_BLC.shape[1]
        scores = new = None
        if self._scores is not None:
            pages, stop = self.batch * self.heads, place + length
            scores = self._scores[: pages * length * stop].view(pages, length, stop)
            new = scores.narrow(2, place, length)
        turn = rope.turn_LA[place : place + length, None]
        shared = _Pass(place, turn, self._future[:length, :length], scores, new)
        h_RW = self.weights.embed(s_BLC.flatten(0, 1))
        for layer, attend in zip(self.weights.layers, self._attend, strict=True):
            h_RW = layer.extend(h_RW, attend, shared)
        mu, sigma = self.weights.affine(h_RW)
        return mu.unflatten(0, (-1, length)), sigma.unflatten(0, (-1, length))
