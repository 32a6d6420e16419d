"""The deep-shallow flow and the model that pairs it with its denoiser.

Knows latents, tokens, orders and which block reads what. Does not know prompts, seeds, sampling schedules
of the deep block (`flow.sampling`) or training. Parameters are only touched inside `forward` of modules; the other
methods are for sampling with unsharded weights.

Shapes: B batch, T latent frames, C channels (of a latent, or of a token where H, W are the token grid),
N tokens per frame, J text tokens, E text width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from flow.block import AffineBlock
from flow.config import FlowConfig
from flow.counters import Work
from flow.denoiser import Denoiser
from flow.inverse import invert_block
from flow.rope import Rope, RopeCache
from flow.tokens import frame_sequence, patchify, unpatchify

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
"""½ ln 2π: what a dimension of the standard normal prior adds to -log p whatever its value."""

DENOISE_STEP = 0.3
"""x = x_noisy - DENOISE_STEP · s: the scale the denoiser's target is expressed in (DESIGN section 3)."""

SHALLOW_TOLERANCE = 1e-10
"""Default stop of the shallow sweeps: relative squared change, per frame."""


class FlowOutput(NamedTuple):
    """What one forward pass of the flow says; a tuple so that sharding hooks find its tensors.

    z_BTHWC: prior tokens; log_det_BTHWC: log|det| per element, summed over blocks; block_log_det: the same for
    each block. All in raster order, fp32 or wider.
    """

    z_BTHWC: Tensor
    log_det_BTHWC: Tensor
    block_log_det: list[Tensor]

    def nats(self) -> Tensor:
        """Negative log-density per element [B, T, H, W, C], without the constant ½ ln 2π."""
        return 0.5 * self.z_BTHWC.square() - self.log_det_BTHWC

    def loss(self) -> Tensor:
        """Mean of `nats`: nats per dimension. Its floor for data smoothed by σ is ½ + ln σ on average."""
        return self.nats().mean()

    def log_prob(self) -> Tensor:
        """Log-density of every video in nats [B], fp64, with the constant: -½ ln 2π of each dimension."""
        return -(self.nats().double() + LOG_SQRT_2PI).flatten(1).sum(1)


class DeepShallowFlow(nn.Module):
    """f_D ∘ f_S of arXiv 2511.20462: shallow blocks inside frames, then one deep block over all of them."""

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
        """Latents [B,T,C,H,W] (images: [B,C,H,W] too) and text -> z, log-determinants.

        Differentiable in parameters and in x: x.grad of the mean loss times x.numel() is -∇ log p.
        Without text the deep block reads tokens only; text is ignored where the model reads none.
        """
        stages = [*self._stages(self.tokens(x), text_BJE)]
        # Sharding hooks refuse views among a root's outputs.
        log_dets = [log_det.clone() for _, log_det in stages]
        return FlowOutput(stages[-1][0].clone(), torch.stack(log_dets).sum(0), log_dets)

    def block_outputs(self, x: Tensor, text_BJE: Tensor | None = None) -> list[Tensor]:
        """Tokens [B,T,H,W,C] before the first block and after each one, in raster order."""
        u_BTHWC = self.tokens(x)
        return [u_BTHWC, *(u for u, _ in self._stages(u_BTHWC, text_BJE))]

    def shallow_forward(self, x: Tensor) -> Tensor:
        """Latents -> u, the tokens between shallow stack and deep block [B,T,H,W,C]."""
        return self.shallow_stack(self.tokens(x))[0]

    def shallow_stack(self, u_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Latent tokens of any frames -> (u, log|det| per element), both [B,T,H,W,C] in raster order."""
        total = torch.zeros_like(u_BTHWC)
        for index in range(len(self.shallow)):
            u_BTHWC, log_det = self._shallow_stage(index, u_BTHWC)
            total = total + log_det
        return u_BTHWC, total

    @torch.no_grad()
    def shallow_inverse(
        self,
        u_BTHWC: Tensor,
        *,
        tolerance: float = SHALLOW_TOLERANCE,
        sequential: bool = False,
        work: Sequence[Work] | None = None,
    ) -> Tensor:
        """u -> latents [B,T,C,H,W], all frames as one batch; every frame meets the tolerance.

        work: one for each shallow block, to which what it took is added.
        """
        u = u_BTHWC
        grid, batch = _grid(u), u.shape[0]
        for index in range(len(self.shallow) - 1, -1, -1):
            flipped = self.config.reversed_order(index)
            z_BNC = rearrange(_oriented(u, flipped), "b t n c -> (b t) n c")
            block, rope = self.shallow[index], self._frame_rope(grid)
            assert isinstance(block, AffineBlock)
            s_BNC = invert_block(
                block,
                z_BNC,
                rope,
                tolerance=tolerance,
                sequential=sequential,
                work=None if work is None else work[index],
            )
            u = _restored(rearrange(s_BNC, "(b t) n c -> b t n c", b=batch), grid, flipped)
        return unpatchify(u, self.config.patch_size)

    def deep_rope(self, grid: tuple[int, int], num_frames: int, text_BJE: Tensor | None) -> Rope:
        """Turns of the deep block's places for a clip, after text where it is given."""
        text_len = 0 if text_BJE is None else text_BJE.shape[1]
        return self.ropes.get(grid, num_frames, text_len, like=self.deep.sos)

    def _frame_rope(self, grid: tuple[int, int]) -> Rope:
        return self.ropes.get(grid, 1, 0, like=self.deep.sos)

    def _stages(self, u: Tensor, text_BJE: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and log-determinants [B,T,H,W,C] after each block."""
        for index in range(len(self.shallow)):
            u, log_det = self._shallow_stage(index, u)
            yield u, log_det
        grid, num_frames = _grid(u), u.shape[1]
        text_BJE = text_BJE if self.config.deep_text else None
        s_BLC = frame_sequence(u, self.deep_reversed)
        pair = self.deep(s_BLC, self.deep_rope(grid, num_frames, text_BJE), text_BJE)
        z, log_det = (rearrange(y, "b (t n) c -> b t n c", t=num_frames) for y in pair)
        yield (
            _restored(z, grid, self.deep_reversed),
            _restored(log_det, grid, self.deep_reversed),
        )

    def _shallow_stage(self, index: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """One shallow block on all frames as one batch."""
        grid, batch, flipped = _grid(u), u.shape[0], self.config.reversed_order(index)
        s_BNC = rearrange(_oriented(u, flipped), "b t n c -> (b t) n c")
        pair = self.shallow[index](s_BNC, self._frame_rope(grid))
        z, log_det = (rearrange(y, "(b t) n c -> b t n c", b=batch) for y in pair)
        return _restored(z, grid, flipped), _restored(log_det, grid, flipped)

    def tokens(self, x: Tensor) -> Tensor:
        """Checked and patchified latents; an image becomes a clip of one frame."""
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


def _grid(u_BTHWC: Tensor) -> tuple[int, int]:
    return u_BTHWC.shape[2], u_BTHWC.shape[3]


def _oriented(u_BTHWC: Tensor, flipped: bool) -> Tensor:
    """Frames of tokens [B,T,N,C] in a block's order."""
    u_BTNC = rearrange(u_BTHWC, "b t h w c -> b t (h w) c")
    return u_BTNC.flip(2) if flipped else u_BTNC


def _restored(u_BTNC: Tensor, grid: tuple[int, int], flipped: bool) -> Tensor:
    """The inverse of `_oriented`."""
    u_BTNC = u_BTNC.flip(2) if flipped else u_BTNC
    return rearrange(u_BTNC, "b t (h w) c -> b t h w c", h=grid[0])


class FlowModel(nn.Module):
    """A flow and, where configured, its denoiser: what a checkpoint holds."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = DeepShallowFlow(config)
        self.denoiser = Denoiser(config) if config.denoiser else None

    def reset_parameters(self) -> None:
        """Fresh start values everywhere, for a model built on the meta device and then allocated."""
        # Children first: a block then zeroes the projection that its child drew.
        for module in reversed([*self.modules()]):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and module is not self:
                reset()

    @staticmethod
    def denoise(x_noisy: Tensor, s: Tensor) -> Tensor:
        """One denoising step, x_noisy - 0.3 s, which is Tweedie's x + σ² ∇ log p."""
        return x_noisy - DENOISE_STEP * s
