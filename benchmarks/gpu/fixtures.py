"""The trained and the reference models that travel with the checkout, without PyYAML.

Knows the layout of `tests/fixtures`: `weights.pth`, `config.yaml`, `case.json`, `case.safetensors`.
Knows nothing of devices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from flow.flow import FlowModel
from flow.released_checkpoint import import_released

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
REFERENCE = FIXTURES / "reference" / "video"
TRAINED = FIXTURES / "trained_small"


@dataclass(frozen=True)
class Fixture:
    """A model in fp32 on the CPU, the tensors of its case, and the weight of guidance."""

    name: str
    model: FlowModel
    tensors: dict[str, Tensor]
    guidance: float


def load_fixture(folder: Path) -> Fixture:
    """Read one folder."""
    with _yaml():
        model, _ = import_released(folder / "weights.pth", folder / "config.yaml")
    scalars = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "case.safetensors")
    return Fixture(folder.name, model.eval(), tensors, float(scalars["guidance"]))


@contextmanager
def _yaml() -> Iterator[None]:
    """PyYAML where it is installed; else a reader of the released format takes its place.

    The importer of released checkpoints reads their YAML, and a machine with a GPU may not have it.
    """
    if find_spec("yaml") is not None:
        yield
        return
    stand_in = ModuleType("yaml")
    vars(stand_in).update(safe_load=read_released_yaml, YAMLError=ValueError)
    sys.modules["yaml"] = stand_in
    try:
        yield
    finally:
        del sys.modules["yaml"]


def read_released_yaml(text: str) -> dict[str, list[dict[str, Any]]]:
    """The released format: a list of one-key maps under `arguments`, values plain.

    >>> read_released_yaml("arguments:\\n- txt_size: 12\\n- vid_size: '9:8'\\n- noise_std: 0.3\\n")
    {'arguments': [{'txt_size': 12}, {'vid_size': '9:8'}, {'noise_std': 0.3}]}
    """
    head, *lines = text.splitlines()
    if head.strip() != "arguments:":
        raise ValueError(f"line 1 is {head!r}: the released format begins with 'arguments:'")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        key, colon, value = line.strip().removeprefix("- ").partition(": ")
        if not line.lstrip().startswith("- ") or not colon:
            raise ValueError(f"line {number} is {line!r}: expected '- KEY: VALUE'")
        rows.append({key: _value(value)})
    return {"arguments": rows}


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")
