"""Weights to start from: a model folder, another run's folder, or one of its checkpoints.

All three are read by the same names, a tensor at a time, so that a model that fits no memory twice
can be loaded, grown and sharded. A run and a checkpoint give their averaged weights, which are
those of the model folder that the run exports. Knows what the model of a run must be to start from
another; nothing of losses or optimizers.

    FlowreelError, ValueError
    └── StartError    nothing to start from, or a model that does not fit; the message names all
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data_prep.latents.dataset import LatentDataset
from flow.config import FlowConfig
from flow.flow import FlowModel
from flow.growth import growth_problems
from flow.model_folder import CONFIG_FILE, read_spec
from flow.tensor_files import SHARD_BYTES, Shape, TensorFolder, check_shapes, weights_digest
from flow.text import TextSpec
from flowreel.errors import FlowreelError, FlowreelWarning
from training.state.checkpoint import (
    CHECKPOINTS_NAME,
    MARKER_NAME,
    Checkpoint,
    averaged_key,
    complete_checkpoints,
    latest_complete,
)


class StartError(FlowreelError, ValueError):
    """Nothing to start from, or a model that does not fit the run."""


@dataclass(frozen=True)
class StartPoint:
    """What a run starts from, as its workers are told.

    Attributes:
        path: the model's or the checkpoint's folder, absolute.
        digest: of the weights in it (`flow.tensor_files.weights_digest`).
    """

    path: str
    digest: str


@dataclass(frozen=True)
class StartSource:
    """A model whose weights can be read by name.

    Attributes:
        path: the folder that holds them.
        flow, text: what was trained.
        codec_digest: of the codec whose latents it was trained on; None where it does not say.
        convention: how codec moments became its latents, as plain values.
        shapes: of all tensors, by their names in `FlowModel`.
        read: one tensor, by that name.
    """

    path: Path
    flow: FlowConfig
    text: TextSpec
    codec_digest: str | None
    convention: dict[str, Any] | None
    shapes: dict[str, Shape]
    read: Callable[[str], Tensor]

    def digest(self) -> str:
        """Digest of all weights; reads them once."""
        return weights_digest((name, self.read(name)) for name in self.shapes)


def open_start(path: str | Path) -> StartSource:
    """The model at a path, of which only headers are read.

    Raises:
        StartError: neither a model folder nor a run nor a checkpoint that is complete.
        CheckpointError, CheckpointMismatch: it is one, but not whole, or of another format.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file():
        if read_spec(folder).adapter is not None:
            raise StartError(
                f"train.start_from {path} is an adapter: start from the model beside it, or make "
                "one by `flowreel merge-adapter`"
            )
        return _model_folder(folder)
    if (folder / CHECKPOINTS_NAME).is_dir():
        latest = latest_complete(folder / CHECKPOINTS_NAME)
        if latest is None:
            raise StartError(f"train.start_from {path}: that run has no complete checkpoint yet")
        return _checkpoint(latest)
    if (folder / MARKER_NAME).is_file():
        for checkpoint in complete_checkpoints(folder.parent):
            if checkpoint.path.name == folder.name:
                return _checkpoint(checkpoint)
    state = "holds none of these" if folder.is_dir() else "is no folder"
    raise StartError(
        f"train.start_from {path} {state}: give a model folder ({CONFIG_FILE} and weights), a "
        f"run's folder, or one of its complete checkpoints ({CHECKPOINTS_NAME}/step_N)"
    )


def _model_folder(folder: Path) -> StartSource:
    spec, files = read_spec(folder), TensorFolder.open(folder)
    convention = None if spec.latents is None else spec.latents.to_dict()
    return _checked(
        StartSource(
            folder,
            spec.flow,
            spec.text,
            spec.codec_digest,
            convention,
            dict(files.shapes),
            files.tensor,
        )
    )


def _checkpoint(checkpoint: Checkpoint) -> StartSource:
    described = checkpoint.description
    if described["train"].get("lora", {}).get("rank"):
        raise StartError(
            f"train.start_from: {checkpoint.path} holds adapters: start from that run's model "
            f"folder, {checkpoint.path.parent.parent / 'model'}"
        )
    reader = FileSystemReader(checkpoint.path)
    stored = {
        key: about
        for key, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }
    keys: dict[str, str] = {}
    for key in stored:
        kind, _, rest = key.partition(".")
        network, _, name = rest.partition(".")
        if kind == "model":
            keys[f"{network}.{name}"] = averaged_key(network, name, stored)

    return _checked(
        StartSource(
            checkpoint.path,
            FlowConfig.from_dict(described["flow"]),
            TextSpec(**described["text"]),
            described["dataset"]["codec_digest"],
            described["dataset"]["convention"],
            {name: tuple(stored[key].size) for name, key in keys.items()},
            _Reader(checkpoint.path, {name: (key, stored[key]) for name, key in keys.items()}).read,
        )
    )


class _Reader:
    """Reads tensors of a checkpoint by name, many at once, for each call of torch's costs a lot.

    A name that is not at hand is read together with those after it, and what was at hand goes.
    """

    def __init__(self, path: Path, stored: dict[str, tuple[str, TensorStorageMetadata]]) -> None:
        self._path, self._stored = path, stored
        self._at_hand: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """The tensor."""
        if name not in self._at_hand:
            self._at_hand = self._batch(name)
        return self._at_hand[name]

    def _batch(self, first: str) -> dict[str, Tensor]:
        names = [*self._stored]
        tensors: dict[str, Tensor] = {}
        size = 0
        for name in names[names.index(first) :]:
            about = self._stored[name][1]
            tensor = torch.empty(about.size, dtype=about.properties.dtype)
            size += tensor.nbytes
            if tensors and size > SHARD_BYTES:
                break
            tensors[name] = tensor
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                {self._stored[name][0]: tensor for name, tensor in tensors.items()},
                storage_reader=FileSystemReader(self._path),
                no_dist=True,
            )
        return tensors


def _checked(source: StartSource) -> StartSource:
    """The source, if it holds the tensors of its own configuration."""
    with torch.device("meta"):
        model = FlowModel(source.flow)
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_shapes(needed, source.shapes, str(source.path))
    return source


def start_point(
    path: str | Path,
    flow: FlowConfig,
    text: TextSpec,
    dataset: LatentDataset,
    latest: Checkpoint | None,
    *,
    as_base: bool = False,
) -> StartPoint:
    """What a run of this model on these latents starts from, checked before a worker is started.

    With `as_base` it stays as it is, as the base of adapters: it must be a model folder, and of the
    very size. A run that has a checkpoint goes on from that; what it started from long ago need not
    be there any more, and is not looked at.

    Raises:
        StartError: every setting that does not fit, in one message. Others as `open_start`.
    """
    absolute = Path(path).expanduser().resolve()
    if latest is not None:
        return StartPoint(str(absolute), latest.description.get("start", {}).get("digest", ""))
    source = open_start(absolute)
    problems = [f"model.{problem}" for problem in growth_problems(source.flow, flow)]
    if as_base:
        problems += _not_a_base(source, flow, is_larger=not problems)
    if (source.text.kind, source.text.dim) != (text.kind, text.dim):
        problems.append(
            f"text is {text.kind} of width {text.dim} but that model reads {source.text.kind} of "
            f"width {source.text.dim}"
        )
    codec = dataset.info.codec_digest
    if source.codec_digest not in (None, codec):
        problems.append(
            f"the latents are of codec {codec} but that model's are of {source.codec_digest}"
        )
    if problems:
        raise StartError(
            f"train.start_from {path} does not fit this run: {'; '.join(problems)}. Set these in "
            "the recipe to what that model has, or start from another"
        )
    _warn_of_convention(source, dataset)
    # The checkpoint, not its run, which may write another before the workers read.
    return StartPoint(str(source.path), _digest(source.path, _stamp(source.path)))


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files."""
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


@lru_cache(maxsize=4)
def _digest(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """Digest of the weights in a folder; a driver that asks twice does not read them twice."""
    return open_start(folder).digest()


def _not_a_base(source: StartSource, flow: FlowConfig, *, is_larger: bool) -> Iterator[str]:
    """What keeps a model from being the base of adapters."""
    if not (source.path / CONFIG_FILE).is_file():
        yield (
            "train.lora needs a model folder, which its adapter names: give "
            f"{source.path.parent.parent / 'model'}"
        )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in FlowModel(flow).state_dict().items()}
    if is_larger and shapes != source.shapes:
        yield "the model is larger than that one: train.lora trains on a model as it is"


def _warn_of_convention(source: StartSource, dataset: LatentDataset) -> None:
    """Say where the latents are scaled otherwise than the model knows them."""
    theirs, ours = (
        json.loads(json.dumps(values))
        for values in (source.convention, dataset.info.convention.to_dict())
    )
    differences = [
        f"{key} is {ours[key]!r} but that model was trained with {value!r}"
        for key, value in (theirs or {}).items()
        # Empty statistics are the codec's own.
        if value not in (ours[key], [])
    ]
    if differences:
        warnings.warn(
            f"train.start_from {source.path}: of the latents' convention, "
            f"{'; '.join(differences)}. The loss starts higher for it; training adapts",
            FlowreelWarning,
            stacklevel=2,
        )
