"""One affine autoregressive block: value and log-determinant from one call.

Knows tokens in the block's own order, and text in front of them. Does not know frames, grids, which
order that is, or how to invert itself (`flow.inverse` does, with the pieces below).

Shapes: B batch, L tokens, C numbers per token, W width, J text tokens, E text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flow.attention import GainNorm, TransformerLayer
from flow.config import FlowConfig
from flow.rope import Rope

SOFTPLUS_SHIFT = 0.541324854612918
"""softplus(SOFTPLUS_SHIFT) = 1, so that a block whose output is zero is the identity."""


class AffineBlock(nn.Module):
    """z_i = (s_i - mu_i(s_<i)) / sigma_i(s_<i) (arXiv 2511.20462, section 3).

    A causal transformer reads [text, sos, s_1 .. s_{L-1}]; what it says at the place of s_{i-1} are mu and
    sigma of s_i. log|det| = -log sigma per element. The affine arithmetic is fp32 (fp64 for fp64 models)
    whatever the transformer computes in.
    """

    def __init__(self, config: FlowConfig, index: int) -> None:
        super().__init__()
        self.is_deep = index == config.num_blocks - 1
        width = config.deep_width if self.is_deep else config.shallow_width
        self.softplus, self.soft_clip = config.softplus, config.soft_clip
        self.sos = nn.Parameter(torch.empty(1, 1, config.token_dim))
        self.proj_in = nn.Linear(config.token_dim, width)
        reads_text = self.is_deep and config.deep_text
        self.proj_txt = nn.Linear(config.text_dim, width) if reads_text else None
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.head_dim) for _ in range(config.layers_per_block[index])
        )
        self.final_norm = GainNorm(width) if config.final_norm else None
        self.proj_out = nn.Linear(width, 2 * config.token_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """This block's own start values: near the identity. Its submodules have their own."""
        nn.init.normal_(self.sos, std=0.02)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, s_BLC: Tensor, rope: Rope, text_BJE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens in this block's order -> (z_BLC, log_det_BLC), both fp32 or wider.

        `rope` has J + L places where text is given, else L.
        """
        mu, sigma = self.predict(s_BLC, rope, text_BJE)
        return (s_BLC - mu) / sigma, -sigma.log()

    def predict(
        self, s_BLC: Tensor, rope: Rope, text_BJE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """mu and sigma [B, L, C] of every token given the true tokens before it."""
        h_BLW, text_len = self.read(s_BLC, text_BJE)
        for layer in self.layers:
            h_BLW = layer(h_BLW, rope)
        return self.affine(h_BLW[:, text_len:])

    def read(self, s_BLC: Tensor, text_BJE: Tensor | None = None) -> tuple[Tensor, int]:
        """What the layers are given, [text, sos, s_1 .. s_{L-1}] embedded: ([B, J + L, W], J)."""
        start = self.sos.to(s_BLC.dtype).expand(len(s_BLC), -1, -1)
        h_BLW = self.embed(torch.cat([start, s_BLC[:, :-1]], dim=1))
        if text_BJE is None or self.proj_txt is None:
            return h_BLW, 0
        return torch.cat([self.embed_text(text_BJE), h_BLW], dim=1), text_BJE.shape[1]

    def embed(self, s_BLC: Tensor) -> Tensor:
        """Tokens (sos among them) -> [B, L, W] in the compute dtype."""
        return self.proj_in(s_BLC.to(self.proj_in.weight.dtype))

    def embed_text(self, text_BJE: Tensor) -> Tensor:
        """Text tokens -> [B, J, W]; only for blocks that read text."""
        assert self.proj_txt is not None
        return self.proj_txt(text_BJE.to(self.proj_txt.weight.dtype))

    def affine(self, h_BLW: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states -> (mu, sigma) [B, L, C], fp32 or wider."""
        if self.final_norm is not None:
            h_BLW = self.final_norm(h_BLW)
        out = self.proj_out(h_BLW)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.soft_clip > 0:
            out = self.soft_clip * torch.tanh(out / self.soft_clip)
        a, mu = out.chunk(2, dim=-1)
        sigma = F.softplus(a + SOFTPLUS_SHIFT) if self.softplus else a.exp()
        return mu, sigma
