"""The deep-shallow flow and the model that pairs it with its denoiser.

Knows latents, tokens, orders and which block reads what. Knows nothing of prompts, seeds, training
or how a block is inverted (`flow.inverse`, `flow.shallow`, `flow.sampling`).

Parameters are only touched inside `forward` of modules, as sharded weights need it; the other
methods are for unsharded weights.

Shapes: B batch, T latent frames, C channels, h, w latent cells, H, W tokens, N tokens of a frame,
J text tokens, E text width (`flow.tokens` has the conventions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from flow.block import AffineBlock
from flow.config import FlowConfig
from flow.denoiser import Denoiser
from flow.rope import Rope, RopeCache
from flow.tokens import block_order, frame_sequence, patchify, raster_order

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
"""½ ln 2π: what a dimension of the standard normal prior adds to -log p whatever its value."""

DENOISE_STEP = 0.3
"""The scale in which the denoiser's target is expressed: x = x_noisy - DENOISE_STEP · s.

See `docs/design.md`, "The model exactly". Whoever needs the number imports it from here.
"""


class FlowOutput(NamedTuple):
    """What one forward pass of the flow says; a tuple so that sharding hooks find its tensors.

    All tensors are in raster order and fp32 or wider.
    """

    z_BTHWC: Tensor
    """Prior tokens: standard normal under the model."""
    log_det_BTHWC: Tensor
    """log|det| of the Jacobian per element, summed over blocks."""
    block_log_det: list[Tensor]
    """The same for each block."""

    def nats(self) -> Tensor:
        """Negative log-density per element [B, T, H, W, C], without the constant ½ ln 2π."""
        return 0.5 * self.z_BTHWC.square() - self.log_det_BTHWC

    def loss(self) -> Tensor:
        """Mean of `nats`: nats per dimension.

        On data smoothed with noise of standard deviation σ it is at least ½ + ln σ on average.
        """
        return self.nats().mean()

    def log_prob(self) -> Tensor:
        """Log-density of every video in nats [B], fp64, ½ ln 2π of each dimension included."""
        return -(self.nats().double() + LOG_SQRT_2PI).flatten(1).sum(1)


class DeepShallowFlow(nn.Module):
    """f_D ∘ f_S: shallow blocks inside frames, then one deep block over all frames and the text.

        u = f_S(x),  z = f_D(u; text),  log p(x) = log N(z; 0, I) + Σ_blocks log|det|

    Source: arXiv 2511.20462, global-local architecture; `docs/design.md`, "The model exactly".

    >>> from flow.config import tiny
    >>> from flow.shallow import shallow_inverse
    >>> flow = DeepShallowFlow(tiny()).double()
    >>> for parameter in flow.parameters():  # a fresh flow is the identity
    ...     _ = torch.nn.init.normal_(parameter, std=0.1)
    >>> x = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64)  # [B, T, C, h, w]
    >>> text = torch.randn(2, 6, 16, dtype=torch.float64)  # [B, J, E]
    >>> out = flow(x, text)
    >>> out.z_BTHWC.shape, out.log_prob().shape
    (torch.Size([2, 3, 2, 5, 4]), torch.Size([2]))
    >>> torch.allclose(shallow_inverse(flow, flow.shallow_forward(x), tolerance=0.0), x)
    True
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        blocks = [AffineBlock(config, index) for index in range(config.num_blocks)]
        self.shallow = nn.ModuleList(blocks[:-1])
        self.deep = blocks[-1]
        self.ropes = RopeCache(config.head_dim, config.pos_len)

    @property
    def deep_reversed(self) -> bool:
        """Whether the deep block reads each frame from its last token to its first."""
        return self.config.reversed_order(self.config.num_blocks - 1)

    def forward(self, x: Tensor, text_BJE: Tensor | None = None) -> FlowOutput:
        """z and log-determinants of latents [B, T, C, h, w] (images: [B, C, h, w] too) and text.

        Differentiable in parameters and in x: x.grad of the mean loss times x.numel() is -∇ log p.
        Without text the deep block reads tokens only; text is ignored where the model reads none.
        """
        results = [*self._block_results(self.tokens(x), text_BJE)]
        # Sharding hooks refuse views among a root's outputs.
        log_dets = [log_det.clone() for _, log_det in results]
        return FlowOutput(results[-1][0].clone(), torch.stack(log_dets).sum(0), log_dets)

    def block_outputs(self, x: Tensor, text_BJE: Tensor | None = None) -> list[Tensor]:
        """Tokens [B, T, H, W, C] before the first block and after each one, in raster order."""
        u_BTHWC = self.tokens(x)
        return [u_BTHWC, *(u for u, _ in self._block_results(u_BTHWC, text_BJE))]

    def shallow_forward(self, x: Tensor) -> Tensor:
        """u of latents: the tokens [B, T, H, W, C] between shallow stack and deep block."""
        return self.shallow_stack(self.tokens(x))[0]

    def shallow_stack(self, u_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        """(u, log|det| per element) of latent tokens, both [B, T, H, W, C] in raster order.

        The frames may be any: the shallow blocks never look from one to another.
        """
        total = torch.zeros_like(u_BTHWC)
        for index in range(len(self.shallow)):
            u_BTHWC, log_det = self._shallow_block(index, u_BTHWC)
            total = total + log_det
        return u_BTHWC, total

    def deep_rope(self, grid: tuple[int, int], num_frames: int, text_BJE: Tensor | None) -> Rope:
        """Turns of the deep block's places for a clip; a text's come first, where it is given."""
        text_len = 0 if text_BJE is None else text_BJE.shape[1]
        return self.ropes.get(grid, num_frames, text_len, like=self.deep.sos)

    def frame_rope(self, grid: tuple[int, int]) -> Rope:
        """Turns of a shallow block's places: those of a single frame."""
        return self.ropes.get(grid, 1, 0, like=self.deep.sos)

    def tokens(self, x: Tensor) -> Tensor:
        """Checked and patchified latents [B, T, H, W, C]; an image becomes a clip of one frame.

        Raises:
            ValueError: latents that do not fit the model; the message names shape and rule.
        """
        config = self.config
        x_BTCHW = x.unsqueeze(1) if x.dim() == 4 else x
        p = config.patch_size
        shape = tuple(x.shape)
        if x_BTCHW.dim() != 5 or shape[-3] != config.latent_channels:
            raise ValueError(
                f"latents of shape {shape}: expected [B,T,{config.latent_channels},h,w]"
                f" or an image [B,{config.latent_channels},h,w]"
            )
        if shape[-2] % p or shape[-1] % p:
            raise ValueError(
                f"latents of shape {shape}: h and w must be multiples of patch_size {p}"
            )
        if not config.video and x_BTCHW.shape[1] != 1:
            raise ValueError(f"latents of shape {shape}: an image model takes one frame")
        return patchify(x_BTCHW, p)

    def _block_results(self, u: Tensor, text_BJE: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and log-determinants [B, T, H, W, C] after each block."""
        for index in range(len(self.shallow)):
            u, log_det = self._shallow_block(index, u)
            yield u, log_det
        grid, num_frames = _grid(u), u.shape[1]
        text_BJE = text_BJE if self.config.deep_text else None
        s_BLC = frame_sequence(u, self.deep_reversed)
        pair = self.deep(s_BLC, self.deep_rope(grid, num_frames, text_BJE), text_BJE)
        z, log_det = (rearrange(y, "b (t n) c -> b t n c", t=num_frames) for y in pair)
        yield (
            raster_order(z, grid, self.deep_reversed),
            raster_order(log_det, grid, self.deep_reversed),
        )

    def _shallow_block(self, index: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """One shallow block on all frames as one batch."""
        grid, batch, flipped = _grid(u), u.shape[0], self.config.reversed_order(index)
        s_BNC = rearrange(block_order(u, flipped), "b t n c -> (b t) n c")
        pair = self.shallow[index](s_BNC, self.frame_rope(grid))
        z, log_det = (rearrange(y, "(b t) n c -> b t n c", b=batch) for y in pair)
        return raster_order(z, grid, flipped), raster_order(log_det, grid, flipped)


def _grid(u_BTHWC: Tensor) -> tuple[int, int]:
    return u_BTHWC.shape[2], u_BTHWC.shape[3]


class FlowModel(nn.Module):
    """A flow and, where configured, its denoiser: what a checkpoint holds.

    >>> from flow.config import tiny
    >>> model = FlowModel(tiny())
    >>> x_noisy = torch.randn(1, 3, 4, 2, 2)
    >>> s = model.denoiser(x_noisy)
    >>> bool((model.denoise(x_noisy, s) == x_noisy).all())  # a fresh denoiser finds no noise
    True
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = DeepShallowFlow(config)
        self.denoiser = Denoiser(config) if config.denoiser else None

    def reset_parameters(self) -> None:
        """Fresh start values everywhere, for a model allocated after it was built on `meta`."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and module is not self:
                reset()

    @staticmethod
    def denoise(x_noisy: Tensor, s: Tensor) -> Tensor:
        """One denoising step, x_noisy - 0.3 s, which is Tweedie's x + σ² ∇ log p.

        Source: arXiv 2511.20462, flow-score matching.
        """
        return x_noisy - DENOISE_STEP * s
