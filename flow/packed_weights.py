"""One block's pass over new places for CPU inference: weights packed for oneDNN, buffers made once.

The numbers are those of `AffineBlock.embed`, its layers' `extend` and `affine`, up to rounding. It
is faster for two reasons. The stock product packs its weight anew at every call and, on AMD
processors, runs at half their vector width; with weights packed once, 80 rows take half the time.
And a pass is some hundred small operations, so those that are not products are few and write in
place.

Knows one block and its caches, and that the two sequences of a guided pair may hold the same
tokens. Knows nothing of solvers or frames.

Shapes: B batch, L places of this call, S places in all, H heads, D head_dim, A = D/2 rotary angles,
M model width, C channels, R = B L rows, P = B H pages.
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

LOGITS_MAX = 2**23
"""Logits of attention (32 MB of them) up to which they are made whole, by a product and a softmax.

On all threads these beat the fused kernel, which shares out 32 queries at a time. Beyond, memory
traffic decides and the fused kernel wins.
"""


def can_pack(block: AffineBlock) -> bool:
    """Whether this build of torch has the packed product for this block: plain fp32 on a CPU."""
    weight = block.proj_in.weight
    # An adapter that is not merged is a layer of its own around a product.
    products = (block.proj_in, *(p for a in block.layers for p in _products(a)), block.proj_out)
    return all(isinstance(product, nn.Linear) for product in products) and (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _products(layer: nn.Module) -> tuple[nn.Module, ...]:
    assert isinstance(layer, TransformerLayer)
    return layer.attention.qkv, layer.attention.proj, layer.mlp.up, layer.mlp.down


class _Linear:
    """x @ weight.T + bias, packed for about `rows` rows; correct for any number of them.

    `_linear_pointwise` applies a GELU to the product in the same call.
    """

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
    """First of the new places."""
    turn_L1A: Tensor
    """Turns of queries and keys, complex."""
    future_LL: Tensor
    """-inf above the diagonal."""
    logits_PLS: Tensor | None
    """Room for the logits of all heads; None where they would be too many."""
    new_PLL: Tensor | None
    """The part of them between the new places."""


class _Attend:
    """Causal attention of new places over one layer's cache, which it writes."""

    def __init__(self, cache: LayerCache) -> None:
        self.kv_2BHSD = cache.kv_2BHSD
        self.batch = cache.k_BHSD.shape[0]
        # Views, so that they show what is written later; sequences and heads are one axis, for the
        # batched product.
        self.k_PDS, self.v_PSD = cache.k_BHSD.flatten(0, 1).mT, cache.v_BHSD.flatten(0, 1)

    def __call__(self, qkv_3BHLD: Tensor, shared: _Pass) -> Tensor:
        """Attention [B L, M] of new places from their scaled queries, keys and values.

        Given half the batch of the cache, it counts for both halves: a guided pair holds the same
        tokens twice, and before its first attention the two are still equal.
        """
        _, rows, _, length, _ = qkv_3BHLD.shape
        q_BHLD, kv_2BHLD = qkv_3BHLD[0], qkv_3BHLD[1:]
        written = self.kv_2BHSD.narrow(3, shared.place, length)
        if rows < self.batch:
            q_BHLD = q_BHLD.expand(2, -1, -1, -1, -1).flatten(0, 1)
            written, kv_2BHLD = written.unflatten(1, (2, rows)), kv_2BHLD.unsqueeze(1)
        written.copy_(kv_2BHLD)
        stop = shared.place + length
        if shared.logits_PLS is None or shared.new_PLL is None:
            k, v = self.kv_2BHSD.narrow(3, 0, stop)
            out = attend_last(q_BHLD, k, v, scale=1.0)
        else:
            logits = shared.logits_PLS
            torch.bmm(
                q_BHLD.reshape(len(logits), length, -1), self.k_PDS.narrow(2, 0, stop), out=logits
            )
            # Only among the new places is there a future to hide: all others lie before them.
            shared.new_PLL.add_(shared.future_LL)
            torch.softmax(logits, -1, out=logits)
            out = torch.bmm(logits, self.v_PSD.narrow(1, 0, stop)).view(q_BHLD.shape)
        return out.transpose(1, 2).reshape(self.batch * length, -1)


class _Layer:
    """One transformer layer; the scale of attention is folded into the product of the queries."""

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

    def extend(self, h_RM: Tensor, attend: _Attend, shared: _Pass) -> Tensor:
        """`TransformerLayer.extend`; a guided pair that comes as one leaves as two.

        It comes so to the first layer. From the first attention on, the two read different texts.
        """
        qkv_R = self.qkv(self.norm(h_RM))
        length = len(shared.turn_L1A)
        qkv_BL3HD = qkv_R.view(-1, length, 3, self.heads, self.head_dim)
        # Queries and keys are turned in place, as complex numbers: one product.
        pairs = torch.view_as_complex(qkv_R.view(-1, length, 3 * self.heads, self.head_dim // 2, 2))
        pairs.narrow(2, 0, 2 * self.heads).mul_(shared.turn_L1A)
        out_RM = self.proj(attend(qkv_BL3HD.permute(2, 0, 3, 1, 4), shared))
        if len(out_RM) == len(h_RM):
            out_RM += h_RM
        else:
            out_RM.view(-1, *h_RM.shape).add_(h_RM)
        return out_RM.add_(self.down(self.up(self.mlp_norm(out_RM))))


class _Weights:
    """A block's layers, input and output products, packed.

    The gain of the final norm and the soft clip's inner factor are folded into the output product.
    """

    def __init__(self, block: AffineBlock, rows: int) -> None:
        self.version = _version(block)
        """Of the weights that were packed."""
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
            # clip tanh(x / clip) = 2 clip sigmoid(2 x / clip) - clip: a sigmoid takes a fifth of a
            # tanh's time.
            weight, bias = weight * (2 / self.clip), bias * (2 / self.clip)
            self.shift -= self.clip
        self.out = _Linear(weight, bias, rows)
        self.epsilon = torch.tensor(RMS_EPSILON)

    def affine(self, h_RM: Tensor) -> tuple[Tensor, Tensor]:
        """`AffineBlock.affine`; overwrites h."""
        if self.normed:
            # The mean square from a norm: one pass over h, and no square of it in memory.
            norm = torch.linalg.vector_norm(h_RM, dim=-1, keepdim=True)
            mean_square = torch.addcmul(self.epsilon, norm, norm, value=1 / h_RM.shape[-1])
            h_RM.mul_(mean_square.rsqrt_())
        out = self.out(h_RM)
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
    weights = _WEIGHTS.get(block)
    if weights is None or weights.version != _version(block):
        weights = _WEIGHTS[block] = _Weights(block, rows)
    return weights


class PackedBlock:
    """A block with packed weights that writes to `caches`.

    Args:
        block: for which `can_pack` holds.
        caches: one for each of its layers; their batch is B, or 2 B of a guided pair.
        rows: the most places of a call.
    """

    def __init__(self, block: AffineBlock, caches: Sequence[LayerCache], rows: int) -> None:
        self.batch, self.heads, places = caches[0].k_BHSD.shape[:3]
        self.rows = min(rows, places)
        self.weights = _weights_of(block, self.batch * self.rows)
        size = self.batch * self.heads * self.rows * places
        self._logits = torch.empty(size) if size <= LOGITS_MAX else None
        self._attend = [_Attend(cache) for cache in caches]
        self._future = torch.full((self.rows, self.rows), float("-inf")).triu_(1)

    def predict(self, s_BLC: Tensor, rope: Rope, place: int) -> tuple[Tensor, Tensor]:
        """mu and sigma [B, L, C] of the tokens after places place .. place + L - 1, which hold s.

        The places' keys and values go to the caches. The tokens of a guided pair are the same
        twice; given once, they are doubled.

        Args:
            s_BLC: tokens, at most `rows` places of them.
            rope: turns of all places.
            place: first of the places, text included.
        """
        length = s_BLC.shape[1]
        logits = new = None
        if self._logits is not None:
            pages, stop = self.batch * self.heads, place + length
            logits = self._logits[: pages * length * stop].view(pages, length, stop)
            new = logits.narrow(2, place, length)
        turn = rope.turn_LA[place : place + length, None]
        shared = _Pass(place, turn, self._future[:length, :length], logits, new)
        h_RM = self.weights.embed(s_BLC.flatten(0, 1))
        for layer, attend in zip(self.weights.layers, self._attend, strict=True):
            h_RM = layer.extend(h_RM, attend, shared)
        mu, sigma = self.weights.affine(h_RM)
        return mu.unflatten(0, (-1, length)), sigma.unflatten(0, (-1, length))
