"""Released checkpoints: a `.pth` of tensors under their released names, and its YAML.

The `.pth` is mapped rather than read: nothing is unpickled beyond tensors (`weights_only=True`),
and no tensor's bytes are read before somebody asks for them. Knows the released names and file
formats. Knows nothing of our model folders. Errors: `flow.tensor_files.CheckpointError`,
`flow.config.ConfigError`.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flow.config import FlowConfig
from flow.flow import FlowModel
from flow.released_yaml import ReleasedNotes, read_notes, read_structure
from flow.tensor_files import CheckpointError, check_shapes

_IGNORED = re.compile(r"(^|\.)(var|attn_mask|feat_rope\..*)$")
_DENOISER_LAYER = re.compile(r"learnable_self_denoiser\.attn_blocks\.(\d+)\.")
_RENAMED = (
    ("denoiser.", "learnable_self_denoiser."),
    ("flow.shallow.", "blocks."),
    (".layers.", ".attn_blocks."),
    (".mlp.up.", ".mlp.main.0."),
    (".mlp.down.", ".mlp.main.2."),
)
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class Released:
    """A released checkpoint that fits its configuration."""

    config: FlowConfig
    tensors: Mapping[str, Tensor]
    """By our names, in our order, still on disk: only to be read, while the file is left alone."""
    notes: ReleasedNotes
    """What the YAML says beside the structure."""


def open_released(
    weights: str | Path,
    config: str | Path,
    text_dim: int | None = None,
    cells_per_img_size: float | None = None,
) -> Released:
    """Map a released `.pth` and hold every tensor against its YAML; reads names and shapes only.

    Args:
        weights: the `.pth`.
        config: its YAML.
        text_dim: width of a text token; read from the weights where they have a text projection.
        cells_per_img_size: see `flow.released_yaml.read_structure`.

    Raises:
        CheckpointError: not such a file, or tensors that do not fit, all of them in one message.
        ConfigError: the YAML.
    """
    stored = {k: v for k, v in _mapped(Path(weights)).items() if not _IGNORED.search(k)}
    widths = {
        int(v.shape[1]) for k, v in stored.items() if k.endswith("proj_txt.weight") and v.dim() == 2
    }
    if len(widths) > 1 or (text_dim is not None and widths - {text_dim}):
        raise CheckpointError(
            f"{weights}: text projections read widths {sorted(widths)}, text_dim is {text_dim}"
        )
    if not widths and text_dim is None:
        raise CheckpointError(f"{weights} has no text projection: pass text_dim")
    structure = read_structure(config, text_dim or widths.pop(), cells_per_img_size)
    layers = {int(m[1]) for name in stored if (m := _DENOISER_LAYER.match(name))}
    if structure.denoiser and layers:
        # The YAML does not say how deep the denoiser is.
        structure = dataclasses.replace(structure, denoiser_layers=max(layers) + 1)
    with torch.device("meta"):
        needed = FlowModel(structure).state_dict()
    names = {name: released_name(name, structure.num_blocks) for name in needed}
    check_shapes(
        {names[name]: tuple(value.shape) for name, value in needed.items()},
        {name: tuple(value.shape) for name, value in stored.items()},
        str(weights),
    )
    tensors = {ours: stored[theirs] for ours, theirs in names.items()}
    return Released(structure, tensors, read_notes(config))


def import_released(
    weights: str | Path,
    config: str | Path,
    text_dim: int | None = None,
    cells_per_img_size: float | None = None,
) -> tuple[FlowModel, FlowConfig]:
    """A released model on the CPU, in the checkpoint's dtype, and its configuration.

    Arguments and errors are those of `open_released`. Where the model is larger than memory, use
    that and `write_model`.
    """
    released = open_released(weights, config, text_dim, cells_per_img_size)
    with torch.device("meta"):
        model = FlowModel(released.config)
    model.load_state_dict({k: v.clone() for k, v in released.tensors.items()}, assign=True)
    return model.requires_grad_(True).eval(), released.config


def released_name(name: str, num_blocks: int) -> str:
    """The name in a released checkpoint of a tensor of `FlowModel`.

    >>> released_name("flow.deep.layers.0.mlp.up.weight", 6)
    'blocks.5.attn_blocks.0.mlp.main.0.weight'
    """
    name = name.replace("flow.deep.", f"blocks.{num_blocks - 1}.")
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return f"{name}_embed" if name.endswith(".sos") else name


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, mapped from the file."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    if magic != _ZIP_MAGIC:
        raise CheckpointError(
            f"{path} is not a plain tensor checkpoint that can be mapped: it is no zip archive, "
            "which torch.save writes since version 1.6. If it is an older one, write it again "
            f'where memory allows: torch.save(torch.load({path.name!r}, map_location="cpu", '
            'weights_only=True), "new.pth")'
        )
    # A private mapping is charged against memory as if all of it were written, and one larger than
    # that is refused. A shared one is not, but needs a file that may be written to. Nobody writes:
    # see `Released.tensors`.
    flags = mmap.MAP_SHARED if os.access(path, os.W_OK) else mmap.MAP_PRIVATE
    try:
        with torch.serialization.set_default_mmap_options(flags):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a broken or unsafe file
        raise CheckpointError(f"{path} is not a plain tensor checkpoint: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, not a map of names to tensors"
        )
    strange = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if strange:
        kind = type(loaded[strange[0]]).__name__
        raise CheckpointError(
            f"{path} is not a map of names to tensors: {strange[0]!r} is a {kind}; "
            "save the state dict alone"
        )
    return loaded
