"""Between codec latents and model latents: which statistics, whose noise, and what later frames are scaled by.

Knows numbers and shapes; no codec.

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

    `x = ((mean − m)/s + noise) · scale_f`, scale 1 for the first frame and `later_frame_scale` after it. Three are in use:
    models that we train take the plain standardised mean (the defaults); `released`, of the released video models, has
    `noise = exp(½ logvar)·ε`, not divided by s; `diffusers`, what that library's pipelines take, divides it too.

    Attributes:
        mean, std: m and s per channel, in codec units; empty stands for the codec's own.
        later_frame_scale: factor on latent frames after the first.
        posterior_noise: whether the posterior is sampled.
        noise_over_std: whether its noise is divided by s.

    >>> released = LatentConvention.released((0.0,), (4.0,))
    >>> one = torch.ones(1, 2, 1, 1, 1)
    >>> released.to_model(0 * one, 0 * one, noise_BTCHW=one).flatten()
    tensor([1.0000, 0.6000])
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    later_frame_scale: float = 1.0
    posterior_noise: bool = False
    noise_over_std: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise CodecError(
                f"latent statistics need as many means as stds, all stds positive; got {len(self.mean)} means, stds {self.std}"
            )

    @classmethod
    def released(
        cls,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        later_frame_scale: float = 0.6,
    ) -> LatentConvention:
        """What the released video models were trained on (DESIGN section 3, codec facts)."""
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
        """Model latents [B, T, C, h, w] of codec moments; `noise_BTCHW` is standard normal, needed where the convention
        samples the posterior."""
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
        """Codec latents [B, T, C, h, w] of model latents; `first_frame` says whether frame 0 here is the video's first."""
        mean, std = self._statistics(x_BTCHW)
        return x_BTCHW / self._frame_scale(x_BTCHW, first_frame) * std + mean

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentConvention:
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
