"""Model folders (safetensors + config.json): written whole or not at all, loaded file by file, imported from released checkpoints.

Knows what a folder holds. Does not know training state, optimizers or where models come from. Errors:
`flow.tensor_files.CheckpointError`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flow.codec_factors import WAN_FACTORS, CodecFactors
from flow.config import ConfigError, FlowConfig
from flow.flow import FlowModel
from flow.latent_convention import LatentConvention
from flow.tensor_files import (
    FORMAT,
    CheckpointError,
    Progress,
    TensorFolder,
    check_shapes,
    write_tensors,
)
from flow.text import TextSpec

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class VideoSpec:
    """The videos a model was trained on.

    num_frames: video frames (1 for images); height, width: pixels; fps: frames per second;
    cell_pixels, latent_every: its codec's factors, pixels per latent row and column and video frames
    per latent frame after the first.
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
    if model.config != spec.flow:
        raise CheckpointError(
            "the spec describes another structure than the model: pass model.config as spec.flow"
        )
    return write_model(directory, model.state_dict(), spec, extra=extra)


def write_model(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    spec: ModelSpec,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> Path:
    """`save_model` of tensors that need not be in memory: those of `Released`, say. They must be `spec.flow`'s, which is not
    checked here. `dtype`, `progress`: see `write_tensors`.
    """
    directory = Path(directory).absolute()
    is_model = (directory / CONFIG_FILE).exists()
    if directory.exists() and not is_model and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(
            f"{directory} holds something that is not a model; choose another folder"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _staging(directory) as staging:
        write_tensors(staging, tensors, dtype=dtype, progress=progress)
        (staging / CONFIG_FILE).write_text(json.dumps(spec.to_dict(), indent=1) + "\n")
        for name, source in (extra or {}).items():
            copy = shutil.copytree if Path(source).is_dir() else shutil.copy2
            copy(source, staging / name)
        for path in staging.rglob("*"):
            if path.is_file():
                _flush(path)
        staging.chmod(0o755)
        _put_in_place(staging, directory)
    return directory


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that is gone afterwards unless it was renamed.

    Its writer holds a lock on it, which dies with the process: what killed writers left is found unlocked and removed.
    """
    _sweep(directory, ".tmp")
    staging = Path(
        tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".tmp", dir=directory.parent)
    )
    handle = _lock(staging)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _sweep(directory: Path, suffix: str) -> None:
    """Remove the folders with this suffix that killed writers of `directory` left beside it."""
    ours = re.compile(rf"\.{re.escape(directory.name)}-[a-z0-9_]+{re.escape(suffix)}")
    for left in directory.parent.iterdir():
        if ours.fullmatch(left.name) and (handle := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """An open handle that holds the folder's lock, or None where another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


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
        # Not `.tmp`: a writer killed here leaves the only model in it, and the next one may fail.
        aside = Path(
            tempfile.mkdtemp(prefix=f".{directory.name}-", suffix=".old", dir=directory.parent)
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
    _sweep(directory, ".old")


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
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    leave_out: Sequence[str] = (),
) -> tuple[FlowModel, ModelSpec]:
    """A model folder -> (model in eval mode on `device` in `dtype`, spec).

    Weights go straight from their files, one after another, to where the model keeps them: no second copy. `CheckpointError`
    names tensors that are missing, extra or of another shape before any is read.

    leave_out: names of modules (such as "flow.shallow") that the model will be without, lists of modules empty; nothing of
    theirs is read.
    """
    spec = read_spec(directory)
    files = TensorFolder.open(directory)
    with torch.device("meta"):
        model = FlowModel(spec.flow)
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(needed, files.shapes, str(directory))
    for name in leave_out:
        owner, _, last = name.rpartition(".")
        part = getattr(model.get_submodule(owner), last)
        empty = nn.ModuleList() if isinstance(part, nn.ModuleList) else None
        setattr(model.get_submodule(owner), last, empty)
    for tensors in files.read(device, dtype, model.state_dict().keys()):
        model.load_state_dict(tensors, strict=False, assign=True)
    return model.requires_grad_(True).eval(), spec
