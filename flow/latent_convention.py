"""Between codec latents and model latents: statistics, posterior noise, the scale of later frames.

Knows numbers and shapes. Knows nothing of networks.

Shapes: B batch, T latent frames, C channels, h, w latent cells.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flow.codec_factors import CodecError


@dataclass(frozen=True)
class LatentConvention:
    """How codec moments become the latents the flow models, and back.

        x = ((mean - m) / s + noise) · scale

    The scale is 1 for the first frame and `later_frame_scale` after it. Three conventions are in
    use:

    - Models that we train take the plain standardised mean: the defaults, without noise.
    - `released`, of the released video models, has noise = exp(½ logvar)·ε, not divided by s.
    - `diffusers`, what that library's pipelines take, divides the noise by s too.

    Source: `docs/design.md`, "The model exactly", codec facts.

    >>> released = LatentConvention.released((0.0,), (4.0,))
    >>> one = torch.ones(1, 2, 1, 1, 1)
    >>> released.to_model(0 * one, 0 * one, noise_BTCHW=one).flatten()
    tensor([1.0000, 0.6000])
    """

    mean: tuple[float, ...] = ()
    """m per channel, in codec units; empty stands for the codec's own."""
    std: tuple[float, ...] = ()
    """s per channel, in codec units; empty stands for the codec's own."""
    later_frame_scale: float = 1.0
    """Factor on latent frames after the first."""
    posterior_noise: bool = False
    """The posterior is sampled; False takes its mean."""
    noise_over_std: bool = False
    """The posterior's noise is divided by s."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise CodecError(
                "latent statistics need as many means as stds, all stds positive; "
                f"got {len(self.mean)} means, stds {self.std}"
            )

    @classmethod
    def released(
        cls,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        later_frame_scale: float = 0.6,
    ) -> LatentConvention:
        """What the released video models were trained on."""
        return cls(mean, std, later_frame_scale, posterior_noise=True)

    @classmethod
    def diffusers(
        cls, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
    ) -> LatentConvention:
        """A posterior sample, standardised; for the SD VAE, m = 0 and 1/s is its scaling factor."""
        return cls(mean, std, posterior_noise=True, noise_over_std=True)

    def with_statistics_of(self, codec: LatentConvention) -> LatentConvention:
        """This convention with the codec's own m and s where it names none."""
        return self if self.mean else replace(self, mean=codec.mean, std=codec.std)

    def _frame_scale(self, x_BTCHW: Tensor, first_frame: bool) -> Tensor:
        scale = torch.full((x_BTCHW.shape[1],), self.later_frame_scale, dtype=x_BTCHW.dtype)
        if first_frame:
            scale[0] = 1.0
        return rearrange(scale, "t -> t 1 1 1").to(x_BTCHW.device)

    def _statistics(self, like_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.mean) != like_BTCHW.shape[2]:
            raise CodecError(
                f"latents of {like_BTCHW.shape[2]} channels, statistics of {len(self.mean)}: "
                "take those of the codec that made them (with_statistics_of)"
            )
        mean, std = (
            torch.tensor(values, dtype=like_BTCHW.dtype, device=like_BTCHW.device)
            for values in (self.mean, self.std)
        )
        return rearrange(mean, "c -> c 1 1"), rearrange(std, "c -> c 1 1")

    def to_model(
        self,
        mean_BTCHW: Tensor,
        logvar_BTCHW: Tensor | None = None,
        noise_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """Model latents [B, T, C, h, w] of codec moments of the same shape.

        Args:
            mean_BTCHW: posterior mean, in codec units.
            logvar_BTCHW, noise_BTCHW: posterior log-variance and standard normal noise; needed
                where the convention samples the posterior.

        Raises:
            CodecError: either is missing, or the statistics are of another number of channels.
        """
        mean, std = self._statistics(mean_BTCHW)
        x_BTCHW = (mean_BTCHW - mean) / std
        if self.posterior_noise:
            if logvar_BTCHW is None or noise_BTCHW is None:
                raise CodecError(
                    "this latent convention samples the posterior: give log-variance and noise"
                )
            noise = torch.exp(0.5 * logvar_BTCHW) * noise_BTCHW
            x_BTCHW = x_BTCHW + (noise / std if self.noise_over_std else noise)
        return x_BTCHW * self._frame_scale(x_BTCHW, first_frame=True)

    def from_model(self, x_BTCHW: Tensor, first_frame: bool = True) -> Tensor:
        """Codec latents [B, T, C, h, w] of model latents: `to_model` undone, noise left in.

        Args:
            x_BTCHW: model latents.
            first_frame: whether frame 0 here is the first of its video.
        """
        mean, std = self._statistics(x_BTCHW)
        return x_BTCHW / self._frame_scale(x_BTCHW, first_frame) * std + mean

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentConvention:
        """The convention that `to_dict` wrote."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
