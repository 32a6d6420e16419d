"""The videos a model was trained on, in plain values. Knows nothing of torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flow.codec_factors import WAN_FACTORS, CodecFactors
from flow.config import ConfigError


@dataclass(frozen=True)
class VideoSpec:
    """The videos a model was trained on.

    num_frames: video frames (1 for images); height, width: pixels; fps: frames per second;
    cell_pixels, latent_every: its codec's factors, pixels per latent row and column and video
    frames per latent frame after the first.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    cell_pixels: int = WAN_FACTORS.space
    latent_every: int = WAN_FACTORS.time

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ConfigError(f"video {field.name} = {value!r}: must be a positive number")

    @property
    def factors(self) -> CodecFactors:
        """What one latent of the model stands for."""
        return CodecFactors(self.cell_pixels, self.latent_every)
