"""`flowreel merge-adapter`: an adapter and its base → an ordinary model folder.

Knows what a folder's codec is called where it is copied. Knows nothing of Ray or training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from flow.adapter import base_folder
from flow.model_folder import CONFIG_FILE, open_weights, read_spec, write_model
from flow.tensor_files import CheckpointError
from pipeline.console import Reporter

CODEC_NAME = "codec"


def merge_adapter(
    adapter: Path,
    out: Path,
    *,
    base: Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> None:
    """Write the model folder, whole or not at all; its tensors have the dtype of the base's.

    Args:
        adapter: folder of an adapter, as a run with `train.lora` leaves it.
        out: the model folder.
        base: the base model's folder; None: where the adapter says.
        overwrite: replace a model that is at `out` already.
        reporter: what is said on the way.

    Raises:
        CheckpointError: no adapter, another base, or `out` holds a model.
    """
    reporter = reporter or Reporter()
    if (out / CONFIG_FILE).exists() and not overwrite:
        raise CheckpointError(f"{out} holds a model already: choose another folder or --overwrite")
    spec = read_spec(adapter)
    if spec.adapter is None:
        raise CheckpointError(
            f"{adapter} is a whole model, no adapter: `flowreel sample {adapter}` takes it as it is"
        )
    base = base_folder(adapter, spec.adapter) if base is None else base
    files = open_weights(adapter, spec, base)
    tensors: dict[str, Tensor] = {}
    for part in files.read():
        tensors |= part
    codec, extra = spec.codec, None
    if codec is not None and (base / CODEC_NAME).is_dir() and Path(codec).name == CODEC_NAME:
        codec, extra = CODEC_NAME, {CODEC_NAME: base / CODEC_NAME}
    merged = dataclasses.replace(spec, adapter=None, codec=codec)
    with reporter.progress("merging") as update:
        write_model(
            out,
            tensors,
            merged,
            extra=extra,
            progress=lambda done, total: update(done >> 20, total >> 20, "MB"),
        )
    reporter.outcome(f"{out}: {base} with {adapter} merged in")
    reporter.document({"model": out, "base": base, "adapter": adapter})
