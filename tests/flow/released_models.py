"""Released checkpoints made by tests, whose bytes are holes in a sparse file.

The published names are written out here on their own, so that they are held against the importer's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flow.flow import FlowModel

Shapes = dict[str, tuple[int, ...]]


def transformer(prefix: str, layers: int, width: int) -> Shapes:
    """attn_blocks.{j} as published: pre-norm attention and MLP, biases everywhere."""
    shapes: Shapes = {}
    for j in range(layers):
        at = f"{prefix}attn_blocks.{j}."
        for norm in ("attention.norm", "mlp.norm"):
            shapes |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
        for linear, rows, columns in (
            ("attention.qkv", 3 * width, width),
            ("attention.proj", width, width),
            ("mlp.main.0", 4 * width, width),
            ("mlp.main.2", width, 4 * width),
        ):
            shapes |= {f"{at}{linear}.weight": (rows, columns), f"{at}{linear}.bias": (rows,)}
    return shapes


def head(prefix: str, width: int, channels: int, out: int, text: int | None) -> Shapes:
    """proj_in, proj_out, final_norm and, with text, proj_txt."""
    shapes: Shapes = {
        f"{prefix}proj_in.weight": (width, channels),
        f"{prefix}proj_in.bias": (width,),
        f"{prefix}proj_out.weight": (out, width),
        f"{prefix}proj_out.bias": (out,),
        f"{prefix}final_norm.weight": (width,),
    }
    if text is not None:
        shapes |= {f"{prefix}proj_txt.weight": (width, text), f"{prefix}proj_txt.bias": (width,)}
    return shapes


def released_shapes(
    *,
    channels: int,
    shallow: int,
    deep: int,
    layers: tuple[int, ...],
    text: int,
    denoiser_layers: int = 0,
) -> Shapes:
    """Every tensor of a released model, and the buffers that are to be ignored."""
    shapes: Shapes = {"var": (64, channels), "feat_rope.freqs_cos": (256, 64)}
    for i, depth in enumerate(layers):
        last = i == len(layers) - 1
        width = deep if last else shallow
        at = f"blocks.{i}."
        shapes |= {f"{at}sos_embed": (1, 1, channels), f"{at}attn_mask": (320, 320)}
        shapes |= head(at, width, channels, 2 * channels, text if last else None)
        shapes |= transformer(at, depth, width)
    if denoiser_layers:
        at = "learnable_self_denoiser."
        shapes |= {f"{at}feat_rope.freqs_sin": (256, 64)}
        shapes |= head(at, shallow, channels, channels, text)
        shapes |= transformer(at, denoiser_layers, shallow)
    return shapes


def sparse_checkpoint(path: Path, shapes: Shapes, dtype: torch.dtype = torch.float32) -> Path:
    """A real torch archive of these tensors whose data are holes: no disk taken, read as zeros."""
    with FakeTensorMode():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
    return path


def released_state(model: FlowModel) -> dict[str, torch.Tensor]:
    """The other direction of the importer, written out here on its own, with buffers to ignore."""
    last = len(model.flow.shallow)
    state = {_released_name(name, last): value for name, value in model.state_dict().items()}
    ignored = ("var", "blocks.0.attn_mask", "feat_rope.freqs_cos")
    return state | {name: torch.zeros(1) for name in ignored}


def _released_name(name: str, last: int) -> str:
    name = name.replace("flow.deep.", f"blocks.{last}.").replace("flow.shallow.", "blocks.")
    name = name.replace("denoiser.", "learnable_self_denoiser.").replace(
        ".layers.", ".attn_blocks."
    )
    name = name.replace(".mlp.up.", ".mlp.main.0.").replace(".mlp.down.", ".mlp.main.2.")
    return name.replace(".sos", ".sos_embed")


def released_yaml(path: Path, **rows: object) -> Path:
    """A YAML in the released format: a list of one-key `arguments`."""
    lines = [f"- {key}: {value!r}" for key, value in rows.items()]
    path.write_text("arguments:\n" + "\n".join(lines) + "\n")
    return path


def billions(module: nn.Module) -> float:
    """Parameters in units of 1e9, as published."""
    return round(sum(p.numel() for p in module.parameters()) / 1e9, 2)
