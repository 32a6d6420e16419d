"""One block's pass over new places for CPU inference: weights repacked for oneDNN, mask rows made once.

The same numbers as `TransformerLayer.extend` up to rounding. The stock product packs its weight anew at every call and,
on AMD processors, runs at half their vector width; with weights packed once, 80 rows take half the time.
Knows one block and its caches. Does not know guidance, solvers or frames.

Shapes: B batch, L places of this call, S places in all, H heads, D head_dim, W width, C numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flow.attention import LayerCache, TransformerLayer
from flow.block import AffineBlock
from flow.rope import Rope


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
    """A linear layer's weight, packed for about `rows` rows; correct for any number of them."""

    def __init__(self, linear: nn.Linear, rows: int, gelu: bool = False) -> None:
        self.bias = linear.bias.detach()
        weight = linear.weight.detach().contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.after: tuple[str, list[float], str] = (
            ("gelu", [], "none") if gelu else ("none", [], "")
        )

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, *self.after)


def _norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """The same function without the module's hooks, which cost as much as the norm at this size."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


class _Layer:
    """The packed products of one transformer layer, and its norms as they are."""

    def __init__(self, layer: TransformerLayer, rows: int) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.norm, self.mlp_norm = _norm(attention.norm), _norm(mlp.norm)
        self.qkv, self.proj = _Linear(attention.qkv, rows), _Linear(attention.proj, rows)
        self.up, self.down = _Linear(mlp.up, rows, gelu=True), _Linear(mlp.down, rows)

    def extend(
        self, h_BLW: Tensor, turn_L1A: Tensor, cache: LayerCache, place: int, mask_LS: Tensor
    ) -> Tensor:
        batch, length, width = h_BLW.shape
        stop = place + length
        qkv = self.qkv(self.norm(h_BLW)).view(batch, length, 3 * self.heads, self.head_dim)
        # Queries and keys are turned in place, as complex numbers.
        pairs = qkv.view(batch, length, 3 * self.heads, -1, 2)
        torch.view_as_complex(pairs)[:, :, : 2 * self.heads].mul_(turn_L1A)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)
        if batch < cache.batch:
            # The first layer of a guided pair, which differs in its text alone.
            h_BLW, q = h_BLW.repeat(2, 1, 1), q.repeat(2, 1, 1, 1)
            k, v, batch = k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), cache.batch
        cache.write(place, k, v)
        out_BHLD = F.scaled_dot_product_attention(
            q, cache.k_BHSD[:, :, :stop], cache.v_BHSD[:, :, :stop], attn_mask=mask_LS
        )
        out_BLW = out_BHLD.transpose(1, 2).reshape(batch, length, width)
        h_BLW = self.proj(out_BLW).add_(h_BLW)
        return h_BLW.add_(self.down(self.up(self.mlp_norm(h_BLW))))


class PackedBlock:
    """A block with packed weights, for caches like the one given; `rows`: the most places of a call."""

    def __init__(self, block: AffineBlock, like_cache: LayerCache, rows: int) -> None:
        batch, places = like_cache.batch, like_cache.k_BHSD.shape[2]
        rows = min(rows, places)
        self.rows, self.places = rows, places
        self.layers = [_Layer(layer, batch * rows) for layer in block.layers]  # type: ignore[arg-type]
        like = block.proj_in.weight
        # Row r of the last `rows` places sees all but the last rows - 1 - r; any call is a corner of this.
        self._mask = torch.full((rows, places), float("-inf"), dtype=like.dtype)
        self._mask.triu_(places - rows + 1)

    def extend(self, h_BLW: Tensor, rope: Rope, caches: list[LayerCache], place: int) -> Tensor:
        """Hidden states of places place .. place + L - 1 (L at most `rows`) through all layers, written to the caches.

        A guided pair's embeddings are the same twice: given once, half the batch of the caches, they are doubled
        where the pair begins to differ.
        """
        length = h_BLW.shape[1]
        stop = place + length
        mask = self._mask[self.rows - length :, self.places - stop :]
        turn = rope.turn_LA[place:stop, None]
        for layer, cache in zip(self.layers, caches, strict=True):
            h_BLW = layer.extend(h_BLW, turn, cache, place, mask)
        return h_BLW
