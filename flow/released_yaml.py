"""The released configuration format: a YAML list of one-key `arguments`.

Knows the released keys and what they mean here (`docs/design.md`, "The model exactly"). Knows
nothing of torch or weights. Errors: `flow.config.ConfigError`, one line with file, key, value and
rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow.codec_factors import SD_FACTORS, WAN_FACTORS
from flow.config import ConfigError, FlowConfig

FIXED: dict[str, tuple[object, ...]] = {
    "seq_order": ("L2R",),
    "nvp": (1, True),
    "rope": (1, True),
    "sos": (1, True),
    "adaln": (0, False),
    "cond_top_only": (1, True),
}
"""Released keys whose value is fixed in this code, with the values that mean what it does."""

NEEDED = ("channel_size", "channels", "layers_per_block", "txt_size", "noise_std")


def read_structure(
    path: str | Path, text_dim: int, cells_per_img_size: float | None = None
) -> FlowConfig:
    """The structure that a released YAML describes; training arguments are ignored.

    Args:
        path: the YAML file.
        text_dim: width of a text token, which the YAML does not say.
        cells_per_img_size: divides `img_size`; it matters only where `pt_seq_len` is absent. By
            default, a YAML that names its `vae` counts pixels (16 to a cell in a video model, 8 in
            an image model), and one that does not counts cells.

    Raises:
        ConfigError: a file that cannot be read, a key that is missing, or structure that this code
            fixes (`seq_order`, `nvp`, ...) set to anything else.
    """
    path = Path(path)
    given = _arguments(path)
    layers = _checked_layers(given, path)
    video = bool(given.get("shallow_block_local", 0))
    patch_size = int(given.get("patch_size", 1))
    if cells_per_img_size is None:
        factors = WAN_FACTORS if video else SD_FACTORS
        cells_per_img_size = factors.space if given.get("vae") else 1
    pos_len = given.get("pt_seq_len") or given["img_size"] / cells_per_img_size / patch_size
    return FlowConfig(
        video=video,
        latent_channels=int(given["channel_size"]),
        patch_size=patch_size,
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
        denoiser=bool(given.get("learnable_self_denoiser", 0)),
        denoiser_text=bool(given.get("conditional_denoiser", 0)),
        denoiser_window=int(given.get("denoiser_window", 10)),
        denoiser_lookahead="every",
        prompt_fps=bool(given.get("fps_cond", 0)),
        prompt_aspect=bool(given.get("mix_aspect", 0)),
        prompt_noise=bool(given.get("cond_noise_level", 0)),
    )


def _checked_layers(given: Mapping[str, Any], path: Path) -> list[int]:
    """Layers of each block, after every rule that the arguments must keep."""
    for key, allowed in FIXED.items():
        if key in given and given[key] not in allowed:
            raise ConfigError(f"{path}: {key} = {given[key]!r}: only {allowed[0]!r} is supported")
    missing = [key for key in NEEDED if key not in given]
    if missing:
        raise ConfigError(f"{path}: released key {missing[0]!r} is missing")
    layers = given["layers_per_block"]
    layers = [int(n) for n in (layers.split() if isinstance(layers, str) else layers)]
    if "blocks" in given and int(given["blocks"]) != len(layers):
        raise ConfigError(
            f"{path}: blocks = {given['blocks']!r} but layers_per_block has {len(layers)} entries"
        )
    if given.get("learnable_self_denoiser", 0) and given.get("temporal_causal", 2) != 2:
        raise ConfigError(
            f"{path}: temporal_causal = {given['temporal_causal']!r}: "
            "only 2 (one frame ahead) is supported"
        )
    if "pt_seq_len" not in given and "img_size" not in given:
        raise ConfigError(f"{path}: one of pt_seq_len and img_size is needed")
    return layers


@dataclass(frozen=True)
class ReleasedNotes:
    """What a released YAML says beside the structure; None where it is silent."""

    vae: str | None
    """Hub id of the codec."""
    later_frame_scale: float
    """Factor on latent frames after the first."""
    text: str | None
    """Hub id of the text encoder."""
    num_frames: int
    """Frames of the training videos; 1 where it was trained on images."""
    fps: float
    """Frames per second of the training videos; 0 where it was trained on images."""
    img_size: int | None
    """Side of a square of the trained area; in pixels where the YAML names a `vae`."""


def read_notes(path: str | Path) -> ReleasedNotes:
    """The notes of a released YAML.

    Raises:
        ConfigError: `vae` is not "ID" or "ID:SCALE", or `vid_size` not "FRAMES:FPS".
    """
    given = _arguments(Path(path))
    vae, _, scale = str(given.get("vae") or "").partition(":")
    size = given.get("vid_size")
    frames, _, fps = ("1:0" if size in (None, "none") else str(size)).partition(":")
    try:
        return ReleasedNotes(
            vae=vae or None,
            later_frame_scale=float(scale or 1.0),
            text=given.get("text"),
            num_frames=int(frames),
            fps=float(fps),
            img_size=given.get("img_size"),
        )
    except ValueError as error:
        raise ConfigError(
            f"{path}: vae = {given.get('vae')!r}, vid_size = {size!r}: "
            f"expected ID:SCALE and FRAMES:FPS ({error})"
        ) from error


def _arguments(path: Path) -> dict[str, Any]:
    """The list of one-key maps under `arguments`, as one map."""
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
