"""How much smaller latents are than video: a codec's factors in space and time, and frame counts.

The one home of both facts. Whoever needs them takes them from a codec (`VideoCodec.factors`), from
a model's `VideoSpec.factors`, or from a codec's `config.json` (`read_factors`). Knows nothing of
torch.

    CodecError(FlowreelError, ValueError)    a codec that cannot be loaded, or what it cannot take
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from flowreel.errors import FlowreelError

CONFIG_NAME = "config.json"
IMAGE_CLASS = "AutoencoderKL"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class CodecError(FlowreelError, ValueError):
    """A codec that cannot be loaded, frames that it cannot take, or latents without statistics."""


class CodecFactors(NamedTuple):
    """What one latent stands for.

    The first latent frame stands for one video frame, each later one for `time` of them.

    >>> wan = CodecFactors(space=16, time=4)
    >>> wan.latent_frames(81), wan.video_frames(21), wan.frames_behind(1)
    (21, 81, range(1, 5))
    """

    space: int
    """Pixels per latent row and column."""
    time: int
    """Video frames per latent frame after the first."""

    def takes(self, num_frames: int) -> bool:
        """Whether a clip of so many frames can be encoded: `time`·k + 1 of them."""
        return num_frames >= 1 and (num_frames - 1) % self.time == 0

    def near_frames(self, num_frames: int) -> tuple[int, int]:
        """The frame counts that can be encoded, at or below, and above."""
        below = max(0, num_frames - 1) // self.time * self.time + 1
        return below, below + self.time

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip. Raises CodecError where it cannot be encoded whole."""
        if not self.takes(num_frames):
            below, above = self.near_frames(num_frames)
            raise CodecError(
                f"{num_frames} frames: the codec takes {self.time}k+1 of them; "
                f"the nearest counts are {below} and {above}"
            )
        return 1 + (num_frames - 1) // self.time

    def video_frames(self, num_latent_frames: int) -> int:
        """Frames that so many latent frames decode to."""
        return 1 + (num_latent_frames - 1) * self.time

    def frames_behind(self, latent_frame: int) -> range:
        """The video frames that one latent frame stands for."""
        first = self.video_frames(latent_frame) if latent_frame else 0
        return range(first, self.video_frames(latent_frame + 1))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of a picture. Raises CodecError where a side does not divide."""
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.space:
                below = side // self.space * self.space
                near = ", ".join(str(n) for n in (below, below + self.space) if n)
                raise CodecError(
                    f"{name} {side} pixels: the codec needs a multiple of {self.space}: use {near}"
                )
        return height // self.space, width // self.space


WAN_FACTORS = CodecFactors(space=16, time=4)
"""Wan2.2's codec, which the released video models read, and the tiny one that ships here."""
SD_FACTORS = CodecFactors(space=8, time=1)
"""The SD VAE, which the released image model reads."""


def factors_of(config: dict[str, Any]) -> CodecFactors:
    """The factors that a codec's `config.json` states, by its class."""
    if config.get("_class_name") == IMAGE_CLASS:
        return CodecFactors(space=2 ** (len(config["block_out_channels"]) - 1), time=1)
    # The library's own defaults, where an older file is silent.
    space, time = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    return CodecFactors(space=int(space), time=int(time))


def read_factors(source: str | Path) -> CodecFactors:
    """The factors of the codec in a folder (or its folder `vae`), or of a hub id; reads no weights.

    Raises:
        CodecError: no `config.json` is there.
    """
    for inside in ("", "vae"):
        path = _config_path(source, inside)
        if path is not None:
            return factors_of(json.loads(path.read_bytes()))
    raise CodecError(
        f"no codec at {source}: neither a folder with {CONFIG_NAME} nor a hub id that answers"
    )


def _config_path(source: str | Path, inside: str) -> Path | None:
    folder = Path(source)
    if folder.is_dir():
        path = folder / inside / CONFIG_NAME
        return path if path.is_file() else None
    if not HUB_ID.fullmatch(str(source)):
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), CONFIG_NAME, subfolder=inside or None))
    except OSError:
        # Not in this place of the repository, or no hub: the caller says what was asked for.
        return None
