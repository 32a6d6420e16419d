"""Model folders (safetensors and config.json): written whole or not at all, loaded file by file.

Knows what a folder holds. Knows nothing of training state, optimizers or released checkpoints.
Errors: `flow.tensor_files.CheckpointError`, `flow.config.ConfigError`.
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

from flow.adapter import AdapterSpec, MergedFolder, base_folder
from flow.config import FlowConfig
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
from flow.text_spec import TextSpec
from flow.video_spec import VideoSpec
from flowreel.files import sync_file, sync_folder

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed, beside the weights, to sample from a model.

    >>> from flow.config import tiny
    >>> spec = ModelSpec(tiny(), TextSpec("hashed", 6, 16))
    >>> ModelSpec.from_dict(spec.to_dict()) == spec
    True
    """

    flow: FlowConfig
    """Its structure."""
    text: TextSpec
    """The text encoder that it reads."""
    codec: str | None = None
    """The codec's folder relative to the model folder, an absolute path or a hub id."""
    codec_digest: str | None = None
    """Digest of the codec that it was trained on."""
    latents: LatentConvention | None = None
    """How codec moments become its latents."""
    video: VideoSpec | None = None
    """The videos that it was trained on."""
    adapter: AdapterSpec | None = None
    """Where the folder holds an adapter's tensors: which model they change."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        adapter = None if self.adapter is None else dataclasses.asdict(self.adapter)
        return {
            "format": FORMAT,
            "flow": self.flow.to_dict(),
            "text": dataclasses.asdict(self.text),
            "codec": self.codec,
            "codec_digest": self.codec_digest,
            "latents": None if self.latents is None else dataclasses.asdict(self.latents),
            "video": None if self.video is None else dataclasses.asdict(self.video),
            **({} if adapter is None else {"adapter": adapter}),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_dict` wrote.

        Raises:
            CheckpointError: another format, or a key that is unknown or missing.
            ConfigError: a value that breaks a rule of the structure.
        """
        if fields.get("format") != FORMAT:
            raise CheckpointError(
                f"format = {fields.get('format')!r}: this version reads {FORMAT!r}"
            )
        known = {"format", *(field.name for field in dataclasses.fields(cls))}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise CheckpointError(f"unknown key {unknown[0]!r} in a model's {CONFIG_FILE}")
        latents, video, adapter = (fields.get(key) for key in ("latents", "video", "adapter"))
        try:
            return cls(
                flow=FlowConfig.from_dict(fields["flow"]),
                text=TextSpec(**fields["text"]),
                codec=fields.get("codec"),
                codec_digest=fields.get("codec_digest"),
                latents=None if latents is None else LatentConvention.from_dict(latents),
                video=None if video is None else VideoSpec(**video),
                adapter=None if adapter is None else AdapterSpec(**adapter),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{CONFIG_FILE} does not describe a model: {error}") from error


def save_model(
    folder: str | Path,
    model: FlowModel,
    spec: ModelSpec,
    *,
    extra: Mapping[str, Path] | None = None,
) -> Path:
    """Write a model folder whole or not at all: made beside its place, flushed, then renamed.

    Args:
        folder: where it goes; a model folder that is there already is replaced.
        model: the model, of the structure `spec.flow`.
        spec: what `config.json` is to say.
        extra: files or folders to copy in, by name inside the folder, such as {"codec": path}.

    Raises:
        CheckpointError: something else is there, or the spec describes another structure.
    """
    if model.config != spec.flow:
        raise CheckpointError(
            "the spec describes another structure than the model: pass model.config as spec.flow"
        )
    return write_model(folder, model.state_dict(), spec, extra=extra)


def write_model(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    spec: ModelSpec,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> Path:
    """`save_model` of tensors that need not be in memory, such as those of `Released`.

    They must be those of `spec.flow`, which is not checked here. `dtype` and `progress` are as in
    `write_tensors`.
    """
    folder = Path(folder).absolute()
    is_model = (folder / CONFIG_FILE).exists()
    if folder.exists() and not is_model and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} holds something that is not a model; choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as staging:
        write_tensors(staging, tensors, dtype=dtype, progress=progress)
        (staging / CONFIG_FILE).write_text(json.dumps(spec.to_dict(), indent=1) + "\n")
        for name, source in (extra or {}).items():
            copy = shutil.copytree if Path(source).is_dir() else shutil.copy2
            copy(source, staging / name)
        for path in staging.rglob("*"):
            if path.is_file():
                sync_file(path)
        # A temporary folder is its owner's alone; a model is for everybody who may read its parent.
        staging.chmod(0o755)
        _put_in_place(staging, folder)
    return folder


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that is gone afterwards unless it was renamed.

    Its writer holds a lock on it, which dies with the process: what killed writers left is
    unlocked, and the next writer removes it.
    """
    _sweep(folder, ".tmp")
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".tmp", dir=folder.parent))
    handle = _lock(staging)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _sweep(folder: Path, suffix: str) -> None:
    """Remove the folders with this suffix that killed writers of `folder` left beside it."""
    ours = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]+{re.escape(suffix)}")
    for leftover in folder.parent.iterdir():
        if ours.fullmatch(leftover.name) and (handle := _lock(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
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


def _put_in_place(staging: Path, folder: Path) -> None:
    """Rename `staging`; a folder that is there steps aside first, and comes back if that fails."""
    if not folder.exists():
        staging.rename(folder)
    else:
        # Not `.tmp`: a writer killed here leaves the only model in it, and the next one may fail.
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".old", dir=folder.parent))
        old = aside / "model"
        folder.rename(old)
        try:
            staging.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)
    _sweep(folder, ".old")


def read_spec(folder: str | Path) -> ModelSpec:
    """The spec of a model folder, without its weights; an adapter's codec is that of its base.

    Raises:
        CheckpointError: not a model folder, or a `config.json` that is not one.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG_FILE}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds {type(fields).__name__}, not a map")
    spec = ModelSpec.from_dict(fields)
    if spec.adapter is None or spec.codec is None:
        return spec
    of_base = base_folder(Path(folder), spec.adapter) / spec.codec
    return dataclasses.replace(spec, codec=str(of_base)) if of_base.is_dir() else spec


def open_weights(
    folder: str | Path, spec: ModelSpec, base: Path | None = None
) -> TensorFolder | MergedFolder:
    """A model folder's tensors; an adapter's are its base's with the adapter merged in.

    Args:
        folder, spec: the folder, and what `read_spec` says of it.
        base: where the base of an adapter is, if not where the adapter says.

    Raises:
        CheckpointError: see `TensorFolder.open` and `MergedFolder.open`.
    """
    if spec.adapter is None:
        return TensorFolder.open(folder)
    return MergedFolder.open(Path(folder), spec.adapter, base)


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    leave_out: Sequence[str] = (),
) -> tuple[FlowModel, ModelSpec]:
    """The model of a folder, in eval mode on `device` in `dtype`, and its spec.

    Weights go straight from their files, one after another, to where the model keeps them: there is
    no second copy. Of an adapter folder, they are those of its base with the adapter merged in.

    Args:
        folder: the model folder.
        device, dtype: where the weights go, and as what.
        leave_out: names of modules, such as "flow.shallow", that the model will be without; a list
            of modules will be empty. Nothing of theirs is read.

    Raises:
        CheckpointError: tensors that are missing, unexpected or of another shape, before any is
            read.
    """
    spec = read_spec(folder)
    files = open_weights(folder, spec)
    with torch.device("meta"):
        model = FlowModel(spec.flow)
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(needed, files.shapes, str(folder))
    for name in leave_out:
        owner, _, last = name.rpartition(".")
        part = getattr(model.get_submodule(owner), last)
        empty = nn.ModuleList() if isinstance(part, nn.ModuleList) else None
        setattr(model.get_submodule(owner), last, empty)
    for tensors in files.read(device, dtype, model.state_dict().keys()):
        model.load_state_dict(tensors, strict=False, assign=True)
    return model.requires_grad_(True).eval(), spec
