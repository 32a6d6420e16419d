"""Checkpoints that are either complete or not there, readable by any number of workers, and their
export for serving.

A checkpoint is a folder `step_N` written by `torch.distributed.checkpoint` (every worker its own
shards); its marker file `complete.json` is written last, after all workers are done, so that a
killed run leaves nothing that looks like a checkpoint. N is the number of steps taken. The marker
also says what was trained; loading into something else is refused with the differences by name.
Knows nothing of Ray, of losses or of the loop.

    ValueError
    └── CheckpointMismatch    a checkpoint of another model, data set or trajectory
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from flow.flow import FlowModel
from flow.model_folder import ModelSpec, save_model
from flowreel.errors import FlowreelError
from training.parallel import Parallel, networks

MARKER_NAME = "complete.json"
FORMAT_VERSION = 1
CODEC_FOLDER = "codec"


class CheckpointMismatch(FlowreelError, ValueError):
    """A checkpoint that does not fit what is to be trained; the message names every difference."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: steps taken.
        description: what was trained, as `describe` in the loop wrote it.
    """

    path: Path
    step: int
    description: dict[str, Any]


def digest_of(values: Mapping[str, Any]) -> str:
    """Short digest of plain values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all, and stays after a power cut."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        json.dump(values, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """All complete checkpoints in a folder, oldest first."""
    found = []
    for marker in root.glob(f"step_*/{MARKER_NAME}"):
        if re.fullmatch(r"step_\d+", marker.parent.name):
            values = json.loads(marker.read_text())
            found.append(Checkpoint(marker.parent, int(values["step"]), values["description"]))
    return sorted(found, key=lambda c: c.step)


def latest_complete(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder, or None."""
    found = complete_checkpoints(root)
    return found[-1] if found else None


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def check_fits(checkpoint: Checkpoint, description: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        CheckpointMismatch: naming every key that differs, with both values.
    """
    old = dict(_flat(json.loads(json.dumps(checkpoint.description))))
    new = dict(_flat(json.loads(json.dumps(description))))
    differences = [
        f"{key} is {new.get(key, 'not set')!r} but the checkpoint has {old.get(key, 'not set')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise CheckpointMismatch(
            f"{checkpoint.path} does not fit this run: {'; '.join(differences)}. "
            "Set these back to resume, or train into another folder"
        )


@contextmanager
def _quiet_single_process() -> Iterator[None]:
    """A single process is what was asked for, so torch need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_checkpoint(
    root: Path,
    step: int,
    state: dict[str, Tensor],
    description: Mapping[str, Any],
    parallel: Parallel,
    keep: int,
) -> Path:
    """Write `root/step_N`, all workers together, then forget all but the `keep` newest."""
    folder = root / f"step_{step:08d}"
    if parallel.broadcast_int(int((folder / MARKER_NAME).is_file())):
        return folder
    if parallel.is_first and folder.exists():
        shutil.rmtree(folder)
    parallel.barrier()
    with _quiet_single_process():
        dcp.save(
            dict(state),
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True),
            no_dist=parallel.mesh is None,
        )
    parallel.barrier()
    if parallel.is_first:
        values = {
            "format": FORMAT_VERSION,
            "step": step,
            "world": parallel.world,
            "digest": digest_of(description),
            "description": description,
        }
        write_json(folder / MARKER_NAME, values)
        _forget(root, keep)
    return folder


def _forget(root: Path, keep: int) -> None:
    for old in complete_checkpoints(root)[:-keep]:
        # Without its marker a half-deleted folder is no checkpoint.
        (old.path / MARKER_NAME).unlink()
        shutil.rmtree(old.path)


def load_checkpoint(checkpoint: Checkpoint, state: dict[str, Tensor], parallel: Parallel) -> None:
    """Overwrite the tensors of `state` in place, whatever number of workers wrote them."""
    with _quiet_single_process():
        dcp.load(
            dict(state),
            storage_reader=FileSystemReader(checkpoint.path),
            no_dist=parallel.mesh is None,
        )


def load_averaged(checkpoint: Checkpoint, model: FlowModel) -> None:
    """Fill an unsharded model with a checkpoint's averaged weights, in this process alone."""
    state: dict[str, Tensor] = {}
    for name, module in networks(model).items():
        for key, parameter in module.named_parameters():
            state[f"optimizer.{name}.ema.{key}"] = parameter.data
    with _quiet_single_process():
        dcp.load(state, storage_reader=FileSystemReader(checkpoint.path), no_dist=True)


def export_model(checkpoint: Checkpoint, spec: ModelSpec, codec: Path | None, out: Path) -> Path:
    """Write the checkpoint's averaged weights as a model folder that `serving` reads.

    The codec is copied in as `codec/`. The folder appears whole; a model that was there is
    replaced.
    """
    with torch.random.fork_rng(devices=[]):
        model = FlowModel(spec.flow)
    load_averaged(checkpoint, model)
    return save_model(out, model, spec, extra=None if codec is None else {CODEC_FOLDER: codec})
