"""Small random models and inputs that the tests of the flow share."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from flow.config import FlowConfig, tiny
from flow.flow import FlowModel

TINY = tiny()


def tiny_config(**changes: object) -> FlowConfig:
    """TINY with some fields changed."""
    return dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def shaken(module: nn.Module, seed: int = 0, scale: float = 0.25) -> nn.Module:
    """Random noise on every parameter, so that no zero start value hides anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += scale * noise / max(1, parameter.shape[-1]) ** 0.5
            if parameter.dim() == 1:
                parameter += 0.5 * scale * noise
    return module


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> FlowModel:
    """A shaken tiny model in eval mode."""
    torch.manual_seed(seed)
    model = FlowModel(tiny_config(**changes)).to(dtype)
    shaken(model, seed)
    return model.eval()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def texts(
    model: FlowModel, batch: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A text and a null text of the model's shape."""
    shape = (batch, model.config.text_len, model.config.text_dim)
    return randn(*shape, seed=71, dtype=dtype), randn(*shape, seed=72, dtype=dtype)


STRUCTURES: dict[str, dict[str, object]] = {
    "deep block reads forward": {},
    "deep block reads in reverse": {"layers_per_block": (1, 1, 2)},
    "patches": {"patch_size": 2, "softplus": False, "soft_clip": 0.0, "final_norm": False},
    "image": {"video": False, "denoiser": False},
    "one block, no text": {"layers_per_block": (2,), "deep_text": False},
}
"""Changes to TINY that together touch every way a flow may be built."""


def latents(model: FlowModel, frames: int = 4, batch: int = 2, seed: int = 1) -> Tensor:
    """Random latents of a model's kind: [B, T, C, h, w], one frame for an image model."""
    p = model.config.patch_size
    frames = frames if model.config.video else 1
    return randn(batch, frames, model.config.latent_channels, 2 * p, 3 * p, seed=seed)
