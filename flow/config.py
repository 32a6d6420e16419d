"""What a flow is made of, in numbers: `FlowConfig`, its rules and its presets.

Knows the names and limits of every structural choice, and which facts a model's prompt states
(`flow.prompt` writes them). Knows nothing of torch, files or training. The released YAML format is
read in `flow.released_yaml`.

    ConfigError(FlowreelError, ValueError)    a key that is unknown, missing, of the wrong kind
                                              or out of range
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flowreel.errors import FlowreelError

TIME_FREQUENCIES = 8
"""Rotary frequencies of the time axis; rows and columns share the other `head_dim/2 - 8`."""

MIN_SPATIAL_FREQUENCIES = 2
"""Rows and columns need at least one frequency each."""

Lookahead = Literal["every", "once", "none"]
LOOKAHEADS: tuple[Lookahead, ...] = ("every", "once", "none")


class ConfigError(FlowreelError, ValueError):
    """A configuration that cannot be built; the message is one line: key, value got, rule."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Structure of one deep-shallow flow and its denoiser.

    Every field is checked when the object is made; `ConfigError` names the key, the value and the
    rule. pydantic can hold this class inside a recipe (unknown keys are refused there too).

    Source: arXiv 2511.20462; the released keys that these fields come from are listed in
    `docs/design.md`, "The model exactly".

    >>> config = tiny(latent_channels=8)
    >>> config.token_dim, config.num_blocks, config.reversed_order(0)
    (8, 4, True)
    >>> FlowConfig.from_dict(config.to_dict()) == config
    True
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    video: bool = True
    """True: shallow blocks act inside a frame, "reverse" means inside a frame. False: images."""
    latent_channels: int
    """Channels C of a latent cell."""
    patch_size: int = 1
    """Side p of the square of latent cells that makes one token of p·p·C channels."""
    text_len: int
    """Text tokens J, padding included."""
    text_dim: int
    """Width of one text token."""
    shallow_width: int
    """Width of the shallow blocks and of the denoiser; a multiple of head_dim."""
    deep_width: int
    """Width of the deep block; a multiple of head_dim."""
    head_dim: int
    """Width D of an attention head; D/2 - 8 rotary frequencies (even, at least 2) are for space."""
    layers_per_block: tuple[int, ...]
    """Transformer layers of each block, in the order data meets them; the deep block is last."""
    noise_std: float
    """Standard deviation σ of the noise that the modelled data carries, in latent units."""
    pos_len: float
    """What sqrt(H·W), the side of the token grid, is scaled to in rotary positions (pt_seq_len)."""
    softplus: bool = True
    """True: sigma = softplus(a + 0.5413). False: sigma = exp(a)."""
    final_norm: bool = True
    """An RMSNorm with gain 1 + weight before each output projection."""
    soft_clip: float = 4.0
    """c of c·tanh(o/c) on the block outputs; 0 turns it off."""
    deep_text: bool = True
    """The deep block reads text."""
    denoiser: bool
    """The model has a learned denoiser."""
    denoiser_layers: int = 8
    """Transformer layers of the denoiser."""
    denoiser_text: bool = True
    """The denoiser reads text."""
    denoiser_window: int = 10
    """Frames that the denoiser looks back: frame f sees frames f + 1 - window and later."""
    denoiser_lookahead: Lookahead = "once"
    """Which denoiser layers see one frame ahead: "every" one, the first ("once"), or "none"."""
    prompt_fps: bool = False
    """The prompt template mentions frames per second."""
    prompt_aspect: bool = False
    """The prompt template mentions the aspect ratio."""
    prompt_noise: bool = False
    """The prompt template mentions the noise level."""

    def __post_init__(self) -> None:
        _check_kinds(self)
        for key in _POSITIVE:
            _require(self, key, getattr(self, key) > 0, "positive")
        for key in ("noise_std", "pos_len"):
            value = getattr(self, key)
            _require(self, key, math.isfinite(value) and value > 0, "positive and finite")
        _require(
            self,
            "soft_clip",
            math.isfinite(self.soft_clip) and self.soft_clip >= 0,
            "0 (off) or positive",
        )
        _require(
            self,
            "layers_per_block",
            len(self.layers_per_block) >= 1 and all(n >= 1 for n in self.layers_per_block),
            "one positive number per block, the deep block last",
        )
        spatial = self.head_dim // 2 - TIME_FREQUENCIES
        _require(
            self,
            "head_dim",
            self.head_dim % 4 == 0 and spatial >= MIN_SPATIAL_FREQUENCIES,
            f"a multiple of 4 and at least {2 * (TIME_FREQUENCIES + MIN_SPATIAL_FREQUENCIES)}",
        )
        for key in ("shallow_width", "deep_width"):
            _require(
                self,
                key,
                getattr(self, key) % self.head_dim == 0,
                f"a multiple of head_dim ({self.head_dim})",
            )
        _require(
            self,
            "denoiser_lookahead",
            self.denoiser_lookahead in LOOKAHEADS,
            f"one of {', '.join(LOOKAHEADS)}",
        )

    @property
    def token_dim(self) -> int:
        """Channels of one token: p·p times those of a latent cell."""
        return self.patch_size**2 * self.latent_channels

    @property
    def num_blocks(self) -> int:
        """Blocks of the flow, the deep one included."""
        return len(self.layers_per_block)

    def reversed_order(self, block: int) -> bool:
        """Whether block `block` (from 0) reads each frame from its last token to its first."""
        return block % 2 == 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; `from_dict` gives the same object back."""
        fields = dataclasses.asdict(self)
        fields["layers_per_block"] = list(self.layers_per_block)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FlowConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: an unknown or missing key, or a value that breaks a rule.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(
                f"unknown key {unknown[0]!r} in a flow configuration; "
                f"known keys: {', '.join(sorted(known))}"
            )
        needed = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in fields
        ]
        if needed:
            raise ConfigError(
                f"a flow configuration needs {needed[0]!r}; "
                f"it has only: {', '.join(sorted(fields))}"
            )
        values = dict(fields)
        if isinstance(values["layers_per_block"], list):
            values["layers_per_block"] = tuple(values["layers_per_block"])
        return cls(**values)


_POSITIVE = (
    "latent_channels",
    "patch_size",
    "text_len",
    "text_dim",
    "shallow_width",
    "deep_width",
    "head_dim",
    "denoiser_layers",
    "denoiser_window",
)


def _require(config: FlowConfig, key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key} = {getattr(config, key)!r}: must be {rule}")


def _check_kinds(config: FlowConfig) -> None:
    """Refuse values of the wrong Python type: "4" or 2.5 layers fail here and not in torch."""
    kinds = {"bool": (bool,), "int": (int,), "float": (int, float), "Lookahead": (str,)}
    for field in dataclasses.fields(config):
        value, annotation = getattr(config, field.name), str(field.type)
        if annotation == "tuple[int, ...]":
            fits = isinstance(value, tuple) and all(type(n) is int for n in value)
            annotation = "a tuple of int"
        else:
            fits = isinstance(value, kinds[annotation])
            if annotation != "bool":
                fits = fits and not isinstance(value, bool)
        _require(config, field.name, fits, f"of type {annotation}")


def video_7b() -> FlowConfig:
    """The released video model: 6.89B parameters = deep 4.84 + shallow 1.14 + denoiser 0.91."""
    return FlowConfig(
        latent_channels=48,
        text_len=256,
        text_dim=2048,
        shallow_width=3072,
        deep_width=4096,
        head_dim=64,
        layers_per_block=(2, 2, 2, 2, 2, 24),
        noise_std=0.5,
        pos_len=32.0,
        denoiser=True,
        denoiser_lookahead="every",
        prompt_fps=True,
        prompt_aspect=True,
        prompt_noise=True,
    )


def image_3b() -> FlowConfig:
    """The released image model on the SD VAE's latents: no denoiser."""
    return FlowConfig(
        video=False,
        latent_channels=4,
        text_len=128,
        text_dim=2048,
        shallow_width=3072,
        deep_width=3072,
        head_dim=64,
        layers_per_block=(2, 2, 2, 2, 2, 24),
        noise_std=0.3,
        pos_len=32.0,
        denoiser=False,
        denoiser_text=False,
        denoiser_lookahead="every",
    )


def tiny(**changes: Any) -> FlowConfig:
    """A video model for examples and tests: 4 blocks of width 32; any field may be changed."""
    fields: dict[str, Any] = {
        "latent_channels": 4,
        "text_len": 6,
        "text_dim": 16,
        "shallow_width": 32,
        "deep_width": 32,
        "head_dim": 32,
        "layers_per_block": (1, 1, 1, 2),
        "noise_std": 0.3,
        "pos_len": 4.0,
        "denoiser": True,
        "denoiser_layers": 2,
    }
    return FlowConfig(**(fields | changes))


PRESETS = {"video-7b": video_7b, "image-3b": image_3b}
"""The released models' configurations by name; call the value."""
