"""One affine autoregressive block: value and log-determinant from one call.

Knows tokens in the block's own order, and text in front of them. Knows nothing of frames, grids,
which order that is, or inversion (`flow.inverse` inverts a block with the pieces below).

Shapes: B batch, L tokens, C channels of a token, M model width, J text tokens, E text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flow.attention import GainNorm, TransformerLayer, ZeroLinear, project_out
from flow.config import FlowConfig
from flow.rope import Rope

SOFTPLUS_SHIFT = 0.541324854612918
"""softplus(SOFTPLUS_SHIFT) = 1, so that a block whose output is zero is the identity."""


class AffineBlock(nn.Module):
    """An affine autoregressive map of tokens s to tokens z, element by element.

        z_i = (s_i - mu_i) / sigma_i,   log|det| = -log sigma_i,   s_i = mu_i + sigma_i z_i

    mu_i and sigma_i depend on s_1 .. s_{i-1} and the text: a causal transformer reads [text, sos,
    s_1 .. s_{L-1}], and what it says at the place of s_{i-1} are mu and sigma of s_i. It says a and
    mu; after the soft clip c·tanh(·/c), sigma = softplus(a + 0.5413), so that a = 0 gives 1 (models
    without softplus: exp(a)). The affine arithmetic is fp32 (fp64 for fp64 models) whatever the
    transformer computes in.

    Source: arXiv 2511.20462; `docs/design.md`, "The model exactly".

    >>> from flow.config import tiny
    >>> from flow.rope import build_rope
    >>> config = tiny()
    >>> block = AffineBlock(config, index=0)
    >>> rope = build_rope(head_dim=config.head_dim, pos_len=4.0, grid=(2, 3), num_frames=1)
    >>> s_BLC = torch.randn(1, 6, config.token_dim)
    >>> z_BLC, log_det_BLC = block(s_BLC, rope)  # a fresh block is the identity
    >>> torch.allclose(z_BLC, s_BLC, atol=1e-6), bool(log_det_BLC.abs().max() < 1e-6)
    (True, True)
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
        self.proj_out = ZeroLinear(width, 2 * config.token_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """This block's own start value; its submodules have theirs."""
        nn.init.normal_(self.sos, std=0.02)

    def forward(
        self, s_BLC: Tensor, rope: Rope, text_BJE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(z, log|det| per element), both [B, L, C] and fp32 or wider.

        Args:
            s_BLC: tokens in this block's order.
            rope: turns of J + L places where text is given, else of L.
            text_BJE: text; ignored by a block that reads none.
        """
        mu, sigma = self.predict(s_BLC, rope, text_BJE)
        return (s_BLC - mu) / sigma, -sigma.log()

    def predict(
        self, s_BLC: Tensor, rope: Rope, text_BJE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """mu and sigma [B, L, C] of every token given the true tokens before it."""
        h_BLM, text_len = self.read(s_BLC, text_BJE)
        for layer in self.layers:
            h_BLM = layer(h_BLM, rope)
        return self.affine(h_BLM[:, text_len:])

    def read(self, s_BLC: Tensor, text_BJE: Tensor | None = None) -> tuple[Tensor, int]:
        """What the layers are given: ([text, sos, s_1 .. s_{L-1}] embedded [B, J + L, M], J)."""
        start = self.sos.to(s_BLC.dtype).expand(len(s_BLC), -1, -1)
        h_BLM = self.embed(torch.cat([start, s_BLC[:, :-1]], dim=1))
        if text_BJE is None or self.proj_txt is None:
            return h_BLM, 0
        return torch.cat([self.embed_text(text_BJE), h_BLM], dim=1), text_BJE.shape[1]

    def embed(self, s_BLC: Tensor) -> Tensor:
        """Tokens (sos among them) as hidden states [B, L, M] in the compute dtype."""
        return self.proj_in(s_BLC.to(self.proj_in.weight.dtype))

    def embed_text(self, text_BJE: Tensor) -> Tensor:
        """Text tokens as hidden states [B, J, M]; only for blocks that read text."""
        assert self.proj_txt is not None
        return self.proj_txt(text_BJE.to(self.proj_txt.weight.dtype))

    def affine(self, h_BLM: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, sigma) [B, L, C], fp32 or wider, of final hidden states."""
        out = project_out(h_BLM, self.final_norm, self.proj_out)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.soft_clip > 0:
            out = self.soft_clip * torch.tanh(out / self.soft_clip)
        a, mu = out.chunk(2, dim=-1)
        sigma = F.softplus(a + SOFTPLUS_SHIFT) if self.softplus else a.exp()
        return mu, sigma
