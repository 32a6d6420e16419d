"""How large everything is: the released 7B at 480p, and toy sizes for a rehearsal on a CPU.

Knows configurations only. Knows nothing of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from flow.codec_factors import WAN_FACTORS
from flow.config import FlowConfig, video_7b


@dataclass(frozen=True)
class Shapes:
    """Sizes of everything that is measured."""

    config: FlowConfig
    """The model's structure."""
    dtype: str
    """Of weights and products: "bfloat16" or "float32"."""
    video: tuple[int, int, int]
    """Frames, height and width of the clip, in pixels."""
    contexts: tuple[int, ...]
    """Places before the window of a pass; the one that matters most comes first."""
    windows: tuple[int, ...]
    """Tokens of a pass, in the same order."""
    case_frames: int
    """Latent frames of the clips on which two devices are compared, where they have as many."""
    counted_frames: int
    """Latent frames of the trained small model's clip whose passes are counted; at least 2."""
    samples: int
    """Timed samples behind a median."""
    square: int
    """Side of the matrices whose product is timed."""
    copied_bytes: int
    """What is copied to measure the bandwidth."""
    step_layers: int
    """The most layers of the deep block in a training step."""

    @property
    def latent_frames(self) -> int:
        """Latent frames of the clip."""
        return WAN_FACTORS.latent_frames(self.video[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Latent rows and columns of the clip."""
        return WAN_FACTORS.grid(*self.video[1:])

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens of the clip.

        >>> FULL.latent_frames, FULL.grid, FULL.tokens
        (21, (30, 53), 33390)
        """
        return self.latent_frames * self.frame_tokens


FULL = Shapes(
    config=video_7b(),
    dtype="bfloat16",
    video=(81, 480, 848),
    contexts=(17_000, 33_000, 300),
    windows=(128, 64, 32, 256, 512),
    case_frames=9,
    counted_frames=9,
    samples=7,
    square=8192,
    copied_bytes=2**32,
    step_layers=24,
)
"""The released video model, and its clip of 81 frames at 480p in the aspect 16:9."""

TOY = FlowConfig(
    latent_channels=8,
    text_len=6,
    text_dim=16,
    shallow_width=64,
    deep_width=64,
    head_dim=32,
    layers_per_block=(1, 1, 3),
    noise_std=0.5,
    pos_len=4.0,
    denoiser=True,
    denoiser_layers=2,
    denoiser_lookahead="every",
)

REHEARSAL = Shapes(
    config=TOY,
    dtype="bfloat16",
    video=(9, 32, 48),
    contexts=(60, 20),
    windows=(8, 4),
    case_frames=1,
    counted_frames=2,
    samples=2,
    square=256,
    copied_bytes=2**22,
    step_layers=3,
)
"""Toy sizes: every line of every part runs, and no figure means anything."""
