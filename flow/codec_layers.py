"""The codec networks' norms in fewer passes over memory, and their kernels laid out for a CPU.

diffusers' norm of Wan makes six tensors of the size of its input and reads across channels that lie
far apart; on a CPU that took as long as the convolutions. What comes out is the same but for
rounding. Knows the library's layers. Knows nothing of frames or latents.

Shapes: B batch, C channels, then time and space, or space alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1e-12
"""Smallest length that a vector of channels is divided by, as torch's `normalize` has it."""


class ChannelNorm(nn.Module):
    """Each place's vector of channels, divided by its root mean square, times a gain.

        y_c = x_c √C / max(|x|, 1e-12) · gamma_c + bias_c

    In half precision the length is fp32, and so is its inverse.

    >>> norm = ChannelNorm(nn.Parameter(torch.ones(3, 1, 1)), 0.0)
    >>> y = norm(torch.full((1, 3, 1, 1), 5.0))
    >>> torch.allclose(y, torch.ones(1, 3, 1, 1))
    True
    """

    def __init__(self, gamma: nn.Parameter, bias: nn.Parameter | float) -> None:
        super().__init__()
        # The names are the library's: they stand in every codec's file.
        self.gamma, self.bias = gamma, bias

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape and dtype of x."""
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = wide.square().sum(dim=1, keepdim=True).clamp_min(LEAST**2).rsqrt()
        y = x * inverse.to(x.dtype) * (self.gamma * len(self.gamma) ** 0.5).to(x.dtype)
        return y if isinstance(self.bias, float) else y + self.bias.to(x.dtype)


def quicken(vae: Any) -> Any:
    """Replace the norms of a Wan codec, and on a CPU lay its kernels out channels last; in place.

    Weights keep their names and values. An image codec has other norms, and keeps them.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, WanRMS_norm) and child.channel_first:
                setattr(module, name, ChannelNorm(child.gamma, child.bias))
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in layouts and parameter.device.type == "cpu":
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
    return vae
