"""Checkpoints that are complete or not there, for any number of workers, and their export.

A checkpoint is a folder `step_N` written by `torch.distributed.checkpoint` (every worker its own
shards); its marker file `complete.json` is written last, after all workers are done, so that a
killed run leaves nothing that looks like a checkpoint. N is the number of steps taken. The marker
says what was trained (loading into something else is refused with the differences by name), and
which bytes every file has (`whole.py`).
An exported model is a folder that `serving` reads. Knows nothing of Ray, of losses or of the loop.

    FlowreelError, ValueError
    └── CheckpointMismatch    a checkpoint of another model, dataset, trajectory or format
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    FileSystemWriter,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flow.flow import FlowModel
from flow.model_folder import ModelSpec, save_model
from flowreel.errors import FlowreelError
from flowreel.values import digest_of, flattened
from flowreel.version import VERSION
from training.config import TrainConfig
from training.parallel import Parallel, networks
from training.state.group import HostGroup
from training.state.whole import Damaged, FileDigest, digests_of, read_marker, write_marker

CHECKPOINTS_NAME = "checkpoints"
MARKER_NAME = "complete.json"
FORMAT_VERSION = 3
"""Raised with every change that an older version cannot read; 3 came with the files' digests."""
OLDEST_FORMAT = 2
"""The oldest that can be resumed; 1 had flat settings."""
PINNED_LATER = ("schedule.steps", "dataset.fps", "dataset.latents", "dataset.captions")
"""Keys of a description that checkpoints of format 2 do not have."""
CODEC_FOLDER = "codec"
SINGLE_PROCESS = "torch.distributed is disabled"
"""How torch's warning of a single process begins."""


class CheckpointMismatch(FlowreelError, ValueError):
    """A checkpoint that does not fit what is to be trained; the message names every difference."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: steps taken.
        description: what was trained, as `describe` in the loop wrote it.
        files: size and digest of every file; empty in a checkpoint of format 2.
        held_out: loss of its averaged weights, nats per dimension; None where it was not measured.
    """

    path: Path
    step: int
    description: dict[str, Any]
    files: dict[str, FileDigest] = field(default_factory=dict)
    held_out: float | None = None


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """All checkpoints in a folder whose marker is whole, oldest first.

    Their files are not looked at (`choice.choose_checkpoint` does).

    Raises:
        CheckpointMismatch: one of them is of another format.
    """
    found = []
    for marker in markers(root):
        try:
            found.append(read_checkpoint(marker))
        except Damaged:
            continue  # whoever resumes finds and says it
    return found


def markers(root: Path) -> list[Path]:
    """Every marker in a folder of checkpoints, the oldest checkpoint's first."""
    return sorted(
        (
            marker
            for marker in root.glob(f"step_*/{MARKER_NAME}")
            if re.fullmatch(r"step_\d+", marker.parent.name)
        ),
        key=lambda marker: int(marker.parent.name.removeprefix("step_")),
    )


def read_checkpoint(marker: Path) -> Checkpoint:
    """The checkpoint that a marker stands for.

    Raises:
        Damaged: the marker is cut, or not what was written.
        CheckpointMismatch: it is of a format that this version does not read.
    """
    values = read_marker(marker)
    number = values.get("format")
    if not isinstance(number, int) or number < OLDEST_FORMAT:
        raise CheckpointMismatch(
            f"{marker.parent} is a checkpoint of format {number!r}, this version reads "
            f"{OLDEST_FORMAT} to {FORMAT_VERSION}: train into another folder, or end that run with "
            "the version of Flowreel that began it"
        )
    if number > FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{marker.parent} is a checkpoint of format {number}, this version "
            f"({VERSION}) reads {OLDEST_FORMAT} to {FORMAT_VERSION}: go on with Flowreel "
            f"{values.get('flowreel', 'of a later version')}, which wrote it"
        )
    files = {name: FileDigest(*about) for name, about in values.get("files", {}).items()}
    held_out = values.get("held_out_nats_per_dim")
    return Checkpoint(marker.parent, int(values["step"]), values["description"], files, held_out)


def latest_complete(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder, or None. Raises as `complete_checkpoints`."""
    checkpoints = complete_checkpoints(root)
    return checkpoints[-1] if checkpoints else None


def check_fits(
    checkpoint: Checkpoint, description: Mapping[str, Any], *, extend: bool = False
) -> None:
    """Refuse a checkpoint of another run.

    A setting that came after the checkpoint had its default there; of what a checkpoint of format
    2 did not note (`PINNED_LATER`) nothing is asked.

    Args:
        checkpoint: what is to be resumed.
        description: the run, as `describe` in the loop writes it.
        extend: let the schedule be another.

    Raises:
        CheckpointMismatch: naming every key that differs, with both values, and the ways to go on.

    >>> checkpoint = Checkpoint(Path("step_00000001"), 1, {"train": {"seed": 0}})
    >>> check_fits(checkpoint, {"train": {"seed": 0}})
    >>> check_fits(checkpoint, {"train": {"seed": 5}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    training.state.checkpoint.CheckpointMismatch: ... train.seed is 5 but the checkpoint has 0. ...
    """
    # Through JSON, so that a tuple of today equals the list that was read from the marker.
    old = flattened(json.loads(json.dumps(checkpoint.description)))
    new = flattened(json.loads(json.dumps(description)))
    defaults = flattened(json.loads(json.dumps({"train": TrainConfig().trajectory()})))
    old = {key: value for key, value in defaults.items() if key in new} | old
    free = {key for key in PINNED_LATER if key not in old}
    # Its resolved length is in `schedule.steps`, whichever setting said it.
    free.add("train.optimizer.schedule_steps")
    if extend:
        free.add("schedule.steps")
    differing = [
        key for key in sorted((old.keys() | new.keys()) - free) if old.get(key) != new.get(key)
    ]
    if differing:
        differences = (
            f"{key} is {new.get(key, 'not set')!r} but the checkpoint has "
            f"{old.get(key, 'not set')!r}"
            for key in differing
        )
        raise CheckpointMismatch(
            f"{checkpoint.path} does not fit this run: {'; '.join(differences)}. "
            + _ways_on(differing, old)
        )


def _ways_on(differing: list[str], old: Mapping[str, Any]) -> str:
    """What to do about keys that differ."""
    if differing == ["schedule.steps"]:
        steps = old["schedule.steps"]
        return (
            f"The learning rate would follow another cosine: set train.optimizer.schedule_steps to "
            f"{steps} to end the one it began and hold its final rate, train.extend to true to "
            "stretch it from here on, or train into another folder with train.start_from"
        )
    if all(key.startswith("dataset.") for key in differing):
        return (
            "The data are not those that it began with: put them back to resume, or train on these "
            "into another folder with train.start_from"
        )
    return "Set these back to resume, or train into another folder"


@contextmanager
def _quiet_single_process() -> Iterator[None]:
    """Keep torch from warning of a single process, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SINGLE_PROCESS)
        yield


class _Writer(FileSystemWriter):
    """Torch's writer, with a disk's own error in place of the one that torch's archive makes of it.

    What an exception was caused by does not travel to other workers.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this worker's file. Raises OSError."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            link: BaseException | None = error
            while link is not None and not isinstance(link, OSError):
                link = link.__cause__ or link.__context__
            raise link or error from error


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after so many steps is."""
    return root / f"step_{step:08d}"


def write_checkpoint(
    root: Path,
    step: int,
    state: Mapping[str, Tensor],
    description: Mapping[str, Any],
    group: HostGroup,
    held_out: float | None = None,
) -> Checkpoint:
    """Write `root/step_N`, all workers together; one that is complete already stays.

    Raises:
        OSError: on all workers alike, where the disk failed one of them.
    """
    folder = folder_of(root, step)
    complete = group.of_first((folder / MARKER_NAME).is_file())
    if complete:
        return read_checkpoint(folder / MARKER_NAME)
    group.together(lambda: shutil.rmtree(folder) if group.is_first and folder.exists() else None)
    try:
        dcp.save(
            dict(state),
            storage_writer=_Writer(folder, single_file_per_rank=True),
            process_group=group.handle,
            no_dist=group.handle is None,
        )
    except CheckpointException as error:
        # Its base is BaseException: nothing would catch it as what it mostly is, a full disk.
        failures = [failure for failure, _trace in error.failures.values()]
        raise next((f for f in failures if isinstance(f, OSError)), failures[0]) from error
    # Each worker looks at the files that it wrote itself; worker 0 at the list of all as well.
    own = [path.name for path in folder.glob(f"__{group.rank}_*")]
    if group.is_first:
        own.append(".metadata")
    parts = group.of_all(group.together(lambda: digests_of(folder, own)))
    files = {name: about for part in parts for name, about in part.items()}
    values = {
        "format": FORMAT_VERSION,
        "flowreel": VERSION,
        "step": step,
        "world": group.world,
        "digest": digest_of(description),
        "description": description,
        "held_out_nats_per_dim": held_out,
        "files": {name: list(about) for name, about in files.items()},
    }
    group.together(lambda: write_marker(folder / MARKER_NAME, values) if group.is_first else None)
    return Checkpoint(folder, step, dict(description), files, held_out)


def remove_old(root: Path, keep: int, keep_best: int = 0) -> None:
    """Remove all complete checkpoints but the newest, and of the older ones those of lowest loss.

    Worker 0 alone calls it.
    """
    complete = complete_checkpoints(root)
    measured = [c for c in complete if c.held_out is not None]
    best = sorted(measured, key=lambda c: (c.held_out, -c.step))[:keep_best]
    for old in complete[:-keep]:
        if old in best:
            continue
        # The marker goes first: a folder that a kill leaves half deleted is then no checkpoint.
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


def averaged_key(network: str, name: str, stored: Container[str]) -> str:
    """Where a checkpoint, whose keys are `stored`, has the averaged value of a parameter.

    What was frozen has no averaged copy: it is its own average.
    """
    averaged = f"optimizer.{network}.ema.{name}"
    return averaged if averaged in stored else f"model.{network}.{name}"


def load_averaged(checkpoint: Checkpoint, model: FlowModel) -> None:
    """Fill an unsharded model with a checkpoint's averaged weights, in this process alone."""
    stored = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    state: dict[str, Tensor] = {}
    for name, module in networks(model).items():
        for key, parameter in module.named_parameters():
            state[averaged_key(name, key, stored)] = parameter.data
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
