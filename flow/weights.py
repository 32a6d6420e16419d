"""Models on disk: our own folders (safetensors + config.json) and released checkpoints (.pth + YAML).

Knows names, shapes and files. Does not know training state, optimizers or where models come from.
Nothing is unpickled beyond tensors (`weights_only=True`).

    ValueError
    └── CheckpointError    a model folder or checkpoint that is not what it says, with names and shapes
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flow.codec import LatentConvention
from flow.config import ConfigError, FlowConfig
from flow.flow import FlowModel
from flow.text import TextSpec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "flowreel-model-1"

_NAMES_SHOWN = 3


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message names the tensors or the file."""


@dataclass(frozen=True)
class VideoSpec:
    """The videos a model was trained on.

    num_frames: video frames (4k + 1); height, width: pixels; fps: frames per second.
    """

    num_frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ConfigError(f"video {field.name} = {value!r}: must be a positive number")


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed, beside the weights, to sample from a model.

    flow: its structure; text: the encoder it reads; codec: the codec's folder relative to the model folder, an
    absolute path or a hub id; codec_digest: digest of the codec it was trained on; latents: how codec
    moments become its latents; video: the videos it was trained on.
    """

    flow: FlowConfig
    text: TextSpec
    codec: str | None = None
    codec_digest: str | None = None
    latents: LatentConvention | None = None
    video: VideoSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format": FORMAT,
            "flow": self.flow.to_dict(),
            "text": dataclasses.asdict(self.text),
            "codec": self.codec,
            "codec_digest": self.codec_digest,
            "latents": None if self.latents is None else dataclasses.asdict(self.latents),
            "video": None if self.video is None else dataclasses.asdict(self.video),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """What `to_dict` wrote; `CheckpointError` or `ConfigError` with the key that is wrong."""
        if fields.get("format") != FORMAT:
            raise CheckpointError(
                f"format = {fields.get('format')!r}: this version reads {FORMAT!r}"
            )
        known = {"format", *(field.name for field in dataclasses.fields(cls))}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise CheckpointError(f"unknown key {unknown[0]!r} in a model's {CONFIG_FILE}")
        latents, video = fields.get("latents"), fields.get("video")
        try:
            return cls(
                flow=FlowConfig.from_dict(fields["flow"]),
                text=TextSpec(**fields["text"]),
                codec=fields.get("codec"),
                codec_digest=fields.get("codec_digest"),
                latents=None if latents is None else LatentConvention.from_dict(latents),
                video=None if video is None else VideoSpec(**video),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{CONFIG_FILE} does not describe a model: {error}") from error


def save_model(
    directory: str | Path,
    model: FlowModel,
    spec: ModelSpec,
    *,
    extra: Mapping[str, Path] | None = None,
) -> Path:
    """Write a model folder whole or not at all: made beside it, flushed, then renamed.

    `extra`: files or folders to copy in, by name inside the folder (such as {"codec": path}). A model folder
    that is there already is replaced; anything else there is refused with `CheckpointError`.
    """
    directory = Path(directory).absolute()
    if model.config != spec.flow:
        raise CheckpointError(
            "the spec describes another structure than the model: pass model.config as spec.flow"
        )
    is_model = (directory / CONFIG_FILE).exists()
    if directory.exists() and not is_model and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(
            f"{directory} holds something that is not a model; choose another folder"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(
        tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".tmp", dir=directory.parent)
    )
    try:
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
        }
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": FORMAT})
        (staging / CONFIG_FILE).write_text(json.dumps(spec.to_dict(), indent=1) + "\n")
        for name, source in (extra or {}).items():
            copy = shutil.copytree if Path(source).is_dir() else shutil.copy2
            copy(source, staging / name)
        for path in staging.rglob("*"):
            if path.is_file():
                _flush(path)
        staging.chmod(0o755)
        _put_in_place(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(staging: Path, directory: Path) -> None:
    """Rename; a folder that is there steps aside first and comes back if the rename fails."""
    if not directory.exists():
        staging.rename(directory)
    else:
        aside = Path(
            tempfile.mkdtemp(prefix=f".{directory.name}-old-", suffix=".tmp", dir=directory.parent)
        )
        old = aside / "model"
        directory.rename(old)
        try:
            staging.rename(directory)
        except OSError:
            old.rename(directory)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _flush(directory.parent)


def read_spec(directory: str | Path) -> ModelSpec:
    """The spec of a model folder, without its weights."""
    path = Path(directory) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is not a model folder: it has no {CONFIG_FILE}"
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds {type(fields).__name__}, not a map")
    return ModelSpec.from_dict(fields)


def load_model(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[FlowModel, ModelSpec]:
    """A model folder -> (model in eval mode on `device` in `dtype`, spec).

    `CheckpointError` names tensors that are missing, extra or of another shape before any is read.
    """
    spec = read_spec(directory)
    path = Path(directory) / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            model = _empty_model(spec.flow)
            names = list(file.keys())
            _check_tensors(
                model, {name: tuple(file.get_slice(name).get_shape()) for name in names}, str(path)
            )
            tensors = {name: file.get_tensor(name).to(dtype) for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or not safetensors: {error}") from error
    return _filled(model, tensors), spec


def import_released(
    weights: str | Path,
    config: str | Path,
    text_dim: int | None = None,
    cells_per_img_size: float = 1.0,
) -> tuple[FlowModel, FlowConfig]:
    """A released `.pth` and its YAML -> (model on CPU in the checkpoint's dtype, configuration).

    `text_dim` is read from the weights where they have a text projection. `cells_per_img_size`: see
    `FlowConfig.from_released_yaml`. Errors: `CheckpointError` (tensors), `ConfigError` (YAML).
    """
    try:
        released = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {weights}") from error
    except Exception as error:  # torch raises many kinds for a broken or unsafe file
        raise CheckpointError(f"{weights} is not a plain tensor checkpoint: {error}") from error
    if not isinstance(released, dict) or not all(isinstance(v, Tensor) for v in released.values()):
        raise CheckpointError(f"{weights} is not a map of names to tensors")
    released = {name: value for name, value in released.items() if not _IGNORED.search(name)}
    widths = {
        int(value.shape[1]) for name, value in released.items() if name.endswith("proj_txt.weight")
    }
    if len(widths) > 1 or (text_dim is not None and widths - {text_dim}):
        raise CheckpointError(
            f"{weights}: text projections read widths {sorted(widths)}, text_dim is {text_dim}"
        )
    if not widths and text_dim is None:
        raise CheckpointError(f"{weights} has no text projection: pass text_dim")
    found = FlowConfig.from_released_yaml(config, text_dim or widths.pop(), cells_per_img_size)
    layers = {int(m[1]) for name in released if (m := _DENOISER_LAYER.match(name))}
    if found.denoiser and layers:
        found = dataclasses.replace(found, denoiser_layers=max(layers) + 1)
    tensors = {_our_name(name, found.num_blocks): value for name, value in released.items()}
    model = _empty_model(found)
    _check_tensors(
        model, {name: tuple(value.shape) for name, value in tensors.items()}, str(weights)
    )
    return _filled(model, tensors), found


_IGNORED = re.compile(r"(^|\.)(var|attn_mask|feat_rope\..*)$")
_DENOISER_LAYER = re.compile(r"learnable_self_denoiser\.attn_blocks\.(\d+)\.")
_RENAMED = (
    (re.compile(r"^learnable_self_denoiser\."), "denoiser."),
    (re.compile(r"\.sos_embed$"), ".sos"),
    (re.compile(r"\.attn_blocks\."), ".layers."),
    (re.compile(r"\.mlp\.main\.0\."), ".mlp.up."),
    (re.compile(r"\.mlp\.main\.2\."), ".mlp.down."),
)


def _our_name(name: str, num_blocks: int) -> str:
    """The name of a released tensor in this code."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        index = int(block[1])
        place = "flow.deep." if index == num_blocks - 1 else f"flow.shallow.{index}."
        name = place + name[block.end() :]
    for pattern, ours in _RENAMED:
        name = pattern.sub(ours, name)
    return name


def _empty_model(config: FlowConfig) -> FlowModel:
    with torch.device("meta"):
        return FlowModel(config)


def _filled(model: FlowModel, tensors: Mapping[str, Tensor]) -> FlowModel:
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True).eval()


def _check_tensors(model: FlowModel, given: Mapping[str, tuple[int, ...]], source: str) -> None:
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [
        f"{name} is {list(given[name])}, needs {list(needed[name])}"
        for name in needed
        if name in given and given[name] != needed[name]
    ]
    problems = {
        "missing": [f"{name} {list(needed[name])}" for name in needed if name not in given],
        "unexpected": [f"{name} {list(given[name])}" for name in given if name not in needed],
        "of another shape": wrong,
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{source} does not fit its configuration; tensors {'; '.join(found)}"
        )


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - _NAMES_SHOWN} more)" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
