"""What a step costs: tokens, floating point operations, and their share of a machine's peak.

Pure arithmetic on a configuration and parameter counts. Knows nothing of time, devices or logs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from flow.config import FlowConfig
from flow.flow import FlowModel


@dataclass(frozen=True)
class StepCost:
    """One step's work, over all workers.

    Attributes:
        tokens: latent tokens that the loss is taken over.
        matmul_flops: 6 FLOPs per weight and token (2 forward, 4 backward), attention left out.
        attention_flops: the products of attention, causal ones counted in half.
        causal_flops: the other half of the causal ones: what a mask hides.

    >>> cost = StepCost(tokens=100, matmul_flops=3e9, attention_flops=1e9)
    >>> cost.utilisation(step_s=0.5, peak_flops=16e9)
    {'mfu': 0.375, 'mfu_attention': 0.5}
    """

    tokens: int
    matmul_flops: float
    attention_flops: float
    causal_flops: float = 0.0

    def utilisation(self, step_s: float, peak_flops: float) -> dict[str, float]:
        """MFU in two conventions: `mfu` counts weights only, `mfu_attention` attention too."""
        return {
            "mfu": self.matmul_flops / (step_s * peak_flops),
            "mfu_attention": (self.matmul_flops + self.attention_flops) / (step_s * peak_flops),
        }


def _weights(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def step_cost(
    model: FlowModel,
    config: FlowConfig,
    *,
    batch: int,
    frames: int,
    height: int,
    width: int,
    with_denoiser: bool,
) -> StepCost:
    """Cost of a step on `batch` clips of `frames` latent frames of height x width latent cells.

    `model` may be sharded: sharded parameters still know their whole size.
    """
    per_frame = (height // config.patch_size) * (width // config.patch_size)
    length = frames * per_frame
    deep_length = length + (config.text_len if config.deep_text else 0)
    matmul = 6.0 * batch * _weights(model.flow.shallow) * length
    matmul += 6.0 * batch * _weights(model.flow.deep) * deep_length
    # Scores and values: 2 products of 2·L²·width forward, twice that backward; half of it where
    # causal.
    local, frames_apart = (per_frame, frames) if config.video else (length, 1)
    attention = sum(
        6.0 * batch * frames_apart * layers * local**2 * config.shallow_width
        for layers in config.layers_per_block[:-1]
    )
    attention += 6.0 * batch * config.layers_per_block[-1] * deep_length**2 * config.deep_width
    causal = attention
    if with_denoiser and model.denoiser is not None:
        read = length + (config.text_len if config.denoiser_text else 0)
        matmul += 6.0 * batch * _weights(model.denoiser) * read
        attention += 12.0 * batch * config.denoiser_layers * read**2 * config.shallow_width
    return StepCost(batch * length, matmul, attention, causal)
