"""What a flow is made of, in numbers: `FlowConfig`, its rules, its presets, and released YAML files.

Knows the names and limits of every structural choice. Does not know torch, training, prompts or files
other than the released configuration format (a YAML list of one-key `arguments`).

    ValueError
    └── ConfigError    a key that is unknown, missing, of the wrong kind or out of range
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from flow.codec_factors import SD_FACTORS, WAN_FACTORS
from flowreel.errors import FlowreelError

TIME_FREQUENCIES = 8
"""Rotary frequencies spent on time; the other `head_dim/2 - 8` are shared by rows and columns."""

MIN_SPATIAL_FREQUENCIES = 2

Lookahead = Literal["every", "once", "none"]
LOOKAHEADS: tuple[Lookahead, ...] = ("every", "once", "none")


class ConfigError(FlowreelError, ValueError):
    """A configuration that cannot be built; the message is one line: key, value got, rule."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Structure of one deep-shallow flow and its denoiser (arXiv 2511.20462, sections 3 and 4).

    Every field is checked when the object is made; `ConfigError` names the key, the value and the rule.
    pydantic can hold this class inside a recipe (unknown keys are refused there too).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    video: bool = True
    """True: shallow blocks act inside one frame, "reverse" means inside a frame. False: one image."""
    latent_channels: int
    """Channels C of a latent cell."""
    patch_size: int = 1
    """Side p of the square of latent cells that makes one token of p·p·C numbers."""
    text_len: int
    """Text tokens J, padding included."""
    text_dim: int
    """Width of one text token."""
    shallow_width: int
    """Width of the shallow blocks and of the denoiser; a multiple of head_dim."""
    deep_width: int
    """Width of the deep block; a multiple of head_dim."""
    head_dim: int
    """Width D of one attention head; D/2 - 8 rotary frequencies are left for space (even, at least 2)."""
    layers_per_block: tuple[int, ...]
    """Transformer layers of each block in the order data meets them; the last block is the deep one."""
    noise_std: float
    """Standard deviation of the noise the modelled data carries, in latent units."""
    pos_len: float
    """What the diagonal-mean side of the token grid is scaled to in rotary positions (pt_seq_len)."""
    softplus: bool = True
    """True: sigma = softplus(a + 0.5413), False: sigma = exp(a)."""
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
    """Frame f sees frames f+1-window and later, in frames."""
    denoiser_lookahead: Lookahead = "once"
    """Which denoiser layers see one frame ahead: every one, the first ("once"), or none."""
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
        """Numbers in one token, p·p·C."""
        return self.patch_size**2 * self.latent_channels

    @property
    def num_blocks(self) -> int:
        """Blocks of the flow, the deep one included."""
        return len(self.layers_per_block)

    def reversed_order(self, block: int) -> bool:
        """Whether block `block` (from 0) reads each frame from its last token to its first."""
        return block % 2 == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same object back."""
        fields = dataclasses.asdict(self)
        fields["layers_per_block"] = list(self.layers_per_block)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FlowConfig:
        """The configuration that `to_dict` wrote; `ConfigError` for unknown or missing keys."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(
                f"unknown key {unknown[0]!r} in a flow configuration; known keys: {', '.join(sorted(known))}"
            )
        needed = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in fields
        ]
        if needed:
            raise ConfigError(
                f"a flow configuration needs {needed[0]!r}; it has only: {', '.join(sorted(fields))}"
            )
        values = dict(fields)
        if isinstance(values["layers_per_block"], list):
            values["layers_per_block"] = tuple(values["layers_per_block"])
        return cls(**values)

    @classmethod
    def from_released_yaml(
        cls, path: str | Path, text_dim: int, cells_per_img_size: float | None = None
    ) -> FlowConfig:
        """Read the released format: a YAML list of one-key `arguments` (training arguments are ignored).

        `cells_per_img_size` divides `img_size`; it only matters where `pt_seq_len` is absent. By default, a YAML that names
        its `vae` counts pixels (16 per cell in a video model, 8 in an image model), one that does not counts cells. Structure
        that this code fixes (`seq_order`, `nvp`, ...) is refused when it is set to anything else.
        """
        return _from_released(cls, Path(path), text_dim, cells_per_img_size)


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
    """Refuse values of the wrong Python type, so that "4" or 2.5 layers fail here and not in torch."""
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


# Released keys whose value is fixed in this code, with the values that mean what it does.
_FIXED_RELEASED: dict[str, tuple[object, ...]] = {
    "seq_order": ("L2R",),
    "nvp": (1, True),
    "rope": (1, True),
    "sos": (1, True),
    "adaln": (0, False),
    "cond_top_only": (1, True),
}


@dataclass(frozen=True)
class ReleasedNotes:
    """What a released YAML says beside the structure; None where it is silent.

    vae: codec's hub id; later_frame_scale: factor on latent frames after the first; text: text encoder's hub id; num_frames,
    fps: of the training videos (1 frame and 0 fps where it trains on images); img_size: side of a square of the trained area,
    in pixels where the YAML names a vae.
    """

    vae: str | None
    later_frame_scale: float
    text: str | None
    num_frames: int
    fps: float
    img_size: int | None

    @classmethod
    def from_yaml(cls, path: str | Path) -> ReleasedNotes:
        """`ConfigError` where `vae` ("ID" or "ID:SCALE") or `vid_size` ("FRAMES:FPS") cannot be read."""
        given = _released_arguments(Path(path))
        vae, _, scale = str(given.get("vae") or "").partition(":")
        size = given.get("vid_size")
        frames, _, fps = ("1:0" if size in (None, "none") else str(size)).partition(":")
        try:
            return cls(
                vae=vae or None,
                later_frame_scale=float(scale or 1.0),
                text=given.get("text"),
                num_frames=int(frames),
                fps=float(fps),
                img_size=given.get("img_size"),
            )
        except ValueError as error:
            raise ConfigError(
                f"{path}: vae = {given.get('vae')!r}, vid_size = {size!r}: expected ID:SCALE and FRAMES:FPS ({error})"
            ) from error


def _released_arguments(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path} as YAML: {' '.join(str(error).split())}") from error
    rows = document.get("arguments") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            f"{path}: expected a list of one-key maps under `arguments`, the released format"
        )
    return {key: value for row in rows for key, value in row.items()}


def _from_released(
    cls: type[FlowConfig], path: Path, text_dim: int, cells: float | None
) -> FlowConfig:
    given = _released_arguments(path)
    for key, allowed in _FIXED_RELEASED.items():
        if key in given and given[key] not in allowed:
            raise ConfigError(f"{path}: {key} = {given[key]!r}: only {allowed[0]!r} is supported")
    missing = [
        key
        for key in ("channel_size", "channels", "layers_per_block", "txt_size", "noise_std")
        if key not in given
    ]
    if missing:
        raise ConfigError(f"{path}: released key {missing[0]!r} is missing")
    layers = given["layers_per_block"]
    layers = [int(n) for n in (layers.split() if isinstance(layers, str) else layers)]
    if "blocks" in given and int(given["blocks"]) != len(layers):
        raise ConfigError(
            f"{path}: blocks = {given['blocks']!r} but layers_per_block has {len(layers)} entries"
        )
    denoiser = bool(given.get("learnable_self_denoiser", 0))
    if denoiser and given.get("temporal_causal", 2) != 2:
        raise ConfigError(
            f"{path}: temporal_causal = {given['temporal_causal']!r}: only 2 (one frame ahead) is supported"
        )
    patch = int(given.get("patch_size", 1))
    if "pt_seq_len" not in given and "img_size" not in given:
        raise ConfigError(f"{path}: one of pt_seq_len and img_size is needed")
    video = bool(given.get("shallow_block_local", 0))
    if cells is None:
        cells = ((WAN_FACTORS if video else SD_FACTORS).space) if given.get("vae") else 1
    pos_len = given.get("pt_seq_len") or given["img_size"] / cells / patch
    return cls(
        video=video,
        latent_channels=int(given["channel_size"]),
        patch_size=patch,
        text_len=int(given["txt_size"]),
        text_dim=text_dim,
        shallow_width=int(given["channels"]),
        deep_width=int(given.get("top_block_channels") or given["channels"]),
        head_dim=int(given.get("head_dim", 64)),
        layers_per_block=tuple(layers),
        noise_std=float(given["noise_std"]),
        pos_len=float(pos_len),
        softplus=bool(given.get("use_softplus", 0)),
        final_norm=bool(given.get("use_final_norm", 0)),
        soft_clip=float(given.get("soft_clip", 0)),
        denoiser=denoiser,
        denoiser_text=bool(given.get("conditional_denoiser", 0)),
        denoiser_window=int(given.get("denoiser_window", 10)),
        denoiser_lookahead="every",
        prompt_fps=bool(given.get("fps_cond", 0)),
        prompt_aspect=bool(given.get("mix_aspect", 0)),
        prompt_noise=bool(given.get("cond_noise_level", 0)),
    )


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


PRESETS = {"video-7b": video_7b, "image-3b": image_3b}
"""Configurations by name; call the value."""
