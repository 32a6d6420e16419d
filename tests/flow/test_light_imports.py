"""Settings and arithmetic load without torch; the model file loads without its solvers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.places import ROOT

LIGHT = (
    "flow",
    "flow.sample_spec",
    "flow.config",
    "flow.released_yaml",
    "flow.aspects",
    "flow.codec_factors",
    "flow.prompt",
    "flow.counters",
)


def _loads(module: str, refused: set[str]) -> None:
    code = (
        f"import sys, {module}\n"
        f"loaded = {refused!r} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(loaded)}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", LIGHT)
def test_settings_load_without_torch(module: str) -> None:
    _loads(module, {"torch", "numpy", "safetensors", "einops", "huggingface_hub"})


def test_the_model_loads_without_its_solvers() -> None:
    _loads("flow.flow", {"flow.inverse", "flow.shallow", "flow.sliding", "flow.sampling"})
