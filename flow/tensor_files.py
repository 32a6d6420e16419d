"""Named tensors on disk: one safetensors file, or shards and their index as Hugging Face has them.

Knows files, shapes and dtypes, and that a tensor may be too large to be in memory twice. Knows
nothing of what the tensors are for.

    CheckpointError(FlowreelError, ValueError)    a model folder or checkpoint that is not what it
                                                  says; the message has names and shapes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowreel.errors import FlowreelError
from flowreel.values import digest_of

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMAT = "flowreel-model-1"

SHARD_BYTES = 1 << 30
"""Most bytes of a shard, and of what a conversion holds; a larger tensor is a shard by itself."""

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""

Shape = tuple[int, ...]


class CheckpointError(FlowreelError, ValueError):
    """A checkpoint that cannot be loaded or written; the message names the tensors or the file."""


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `model.safetensors`, or numbered shards and their index where one would be too large.

    Tensors mapped from a file are read as they are written: what is held in memory is one converted
    shard at most, and nothing where no tensor is converted. The files are not flushed to the disk:
    whoever makes the folder whole (`flow.model_folder`) does that once for all of them.

    Args:
        folder: where the files go.
        tensors: in the order in which they are to lie on disk.
        dtype: of floating-point tensors on disk; None keeps each one's own.
        shard_bytes: the most bytes of a file, unless one tensor alone has more.
        progress: called after every file.

    Returns:
        The files written.
    """
    shards = _plan(tensors, dtype, shard_bytes)
    total = sum(_bytes_as(value, dtype) for value in tensors.values())
    written_bytes = 0
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards, start=1):
        name = WEIGHTS_FILE
        if len(shards) > 1:
            name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        shard = {key: _as_written(tensors[key], dtype) for key in names}
        save_file(shard, folder / name, metadata={"format": FORMAT})
        paths.append(folder / name)
        weight_map |= dict.fromkeys(names, name)
        written_bytes += sum(value.nbytes for value in shard.values())
        # Before the next shard is made, or two would be in memory.
        del shard
        if progress is not None:
            progress(written_bytes, total)
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index_json, indent=1) + "\n")
        paths.append(folder / INDEX_FILE)
    return paths


def _plan(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int
) -> list[list[str]]:
    """Names of each shard: tensors in order, a new shard where the next would not fit."""
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name, value in tensors.items():
        size = _bytes_as(value, dtype)
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += size
    return shards


def _bytes_as(value: Tensor, dtype: torch.dtype | None) -> int:
    size = dtype.itemsize if dtype is not None and value.is_floating_point() else value.itemsize
    return value.numel() * size


def _as_written(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    value = value.cpu().contiguous()
    # A part of a larger storage is copied: safetensors refuses what might be shared.
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


@dataclass(frozen=True)
class TensorFolder:
    """The tensors of a folder in the layout of `write_tensors`; only headers have been read.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> files = write_tensors(folder, {"weight": torch.zeros(2, 3)})
    >>> TensorFolder.open(folder).shapes
    {'weight': (2, 3)}
    """

    path: Path
    files: Mapping[str, tuple[str, ...]]
    """Names of the tensors in each file."""
    shapes: Mapping[str, Shape]
    """Shapes of all tensors."""

    @classmethod
    def open(cls, path: str | Path) -> TensorFolder:
        """Read the index and the headers.

        Raises:
            CheckpointError: no weights, or a shard that is missing, cut short, or lacks a tensor
                that the index puts there.
        """
        path = Path(path)
        expected = _expected_files(path)
        files: dict[str, tuple[str, ...]] = {}
        shapes: dict[str, Shape] = {}
        for name, promised in expected.items():
            try:
                with safe_open(path / name, framework="pt") as file:
                    keys = tuple(file.keys())
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in keys}
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} has no {name}, which its index names") from error
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path / name} is cut short or not safetensors: {error}"
                ) from error
            if missing := sorted(set(promised or ()) - set(keys)):
                raise CheckpointError(
                    f"{path / name} lacks tensors that the index puts there: {', '.join(missing)}"
                )
            files[name] = keys
        return cls(path, files, shapes)

    def read(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        names: Container[str] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Read file by file: each time the tensors of one file, by name.

        Floating-point tensors come in `dtype`; they are converted one at a time, so that no file is
        in memory twice. A file that has none of the `names` (None: all names) is not opened.
        """
        for name, there in self.files.items():
            if keys := [key for key in there if names is None or key in names]:
                with safe_open(self.path / name, framework="pt", device=str(device)) as file:
                    yield {key: _cast(file.get_tensor(key), dtype) for key in keys}

    def digest(self) -> str:
        """Digest of all weights (`weights_digest`); reads them once."""
        return weights_digest(pair for tensors in self.read() for pair in tensors.items())

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name, as it lies on disk."""
        file_name = next(file_name for file_name, keys in self.files.items() if name in keys)
        with safe_open(self.path / file_name, framework="pt") as file:
            return file.get_tensor(name)


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Names what tensors hold, in whatever order, files or shards they lie: 16 hex digits.

    >>> one, two = ("one", torch.ones(2)), ("two", torch.zeros(3))
    >>> weights_digest([one, two]) == weights_digest([two, one])
    True
    >>> weights_digest([one, two]) == weights_digest([one, ("two", torch.ones(3))])
    False
    """
    digests = {}
    for name, value in tensors:
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha = hashlib.sha256(flat.numpy().data).hexdigest()
        digests[name] = [str(value.dtype), list(value.shape), sha]
    return digest_of(digests)


def _expected_files(path: Path) -> dict[str, tuple[str, ...] | None]:
    """File names, each with the tensors that an index puts there; None where there is no index."""
    if (path / WEIGHTS_FILE).exists():
        return {WEIGHTS_FILE: None}
    index = path / INDEX_FILE
    if not index.exists():
        raise CheckpointError(f"{path} has no {WEIGHTS_FILE} and no {INDEX_FILE}")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        expected: dict[str, tuple[str, ...]] = {}
        for key, name in weight_map.items():
            expected[name] = (*expected.get(name, ()), key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of shards: it needs a `weight_map` of names to files ({error!r})"
        ) from error
    if strange := [name for name in expected if Path(name).name != name]:
        raise CheckpointError(
            f"{index} names {strange[0]!r}: shards lie in the folder of their index"
        )
    return dict(expected)


def check_shapes(needed: Mapping[str, Shape], given: Mapping[str, Shape], source: str) -> None:
    """Refuse tensors that do not fit, each named with the shape it has and the one it needs.

    Raises:
        CheckpointError: one message for all that are missing, unexpected or of another shape.
    """
    problems = {
        "missing": [f"{name} {list(shape)}" for name, shape in needed.items() if name not in given],
        "unexpected": [
            f"{name} {list(shape)}" for name, shape in given.items() if name not in needed
        ],
        "of another shape": [
            f"{name} is {list(given[name])}, needs {list(shape)}"
            for name, shape in needed.items()
            if name in given and given[name] != shape
        ],
    }
    sentences = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if sentences:
        raise CheckpointError(
            f"{source} does not fit its configuration; tensors {'; '.join(sentences)}"
        )
