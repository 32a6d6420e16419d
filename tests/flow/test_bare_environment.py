"""With every library but torch refused, `flow/` and `benchmarks/sampling.py` import and run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flow.model_folder import ModelSpec, VideoSpec, save_model
from flow.text import TextSpec
from tests.flow.models import randn, texts, tiny_model
from tests.flow.released_models import released_state, released_yaml
from tests.flow.test_released_checkpoint import TINY
from tests.places import ROOT

# All that a GPU box needs beside torch (and what torch itself brings).
NEEDED = {"torch", "safetensors", "einops", "numpy", "pyyaml", "jinja2"}

REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r} (refused)", name=name)

sys.meta_path.insert(0, Refuse())
"""

SAMPLE = """
import importlib, pathlib
for path in sorted(pathlib.Path("flow").glob("*.py")):
    importlib.import_module(f"flow.{path.stem}" if path.stem != "__init__" else "flow")

import torch
from flow.latent_convention import LatentConvention
from flow.sampling import sample
from flow.sample_spec import SampleSpec
from flow.prompt import format_prompt
from flow.text import build_text_encoder
from flow.model_folder import load_model

torch.set_num_threads(1)
model, spec = load_model(sys.argv[1])
prompts = [format_prompt("a red circle", fps=8), format_prompt("", fps=8)]
both = build_text_encoder(spec.text).encode(prompts)
for schedule in ("sliding", "jacobi", "sequential"):
    asked = SampleSpec(num_frames=3, grid=(2, 2), guidance=1.0, schedule=schedule)
    x = sample(model, both[:1], both[1:], asked)
    assert x.shape == (1, 3, 4, 2, 2) and x.isfinite().all()
model.flow(x, both[:1]).loss().backward()
LatentConvention.released((0.0,) * 4, (1.0,) * 4).from_model(x)
print("sampled")
"""

BENCHMARK = """
import runpy
options = ["--rounds", "1", "--threads", "1", "--no-figures"]
sys.argv = ["benchmarks.sampling", "--model", sys.argv[1], *options]
runpy.run_module("benchmarks.sampling", run_name="__main__")
"""


def refused() -> list[str]:
    """Top-level modules of every library that the project names, but for those in NEEDED."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for group in project.get("optional-dependencies", {}).values() for name in group]
    named = {re.split(r"[^\w.-]", line)[0].lower() for line in project["dependencies"] + extras}
    modules = {
        module
        for module, owners in packages_distributions().items()
        if {owner.lower() for owner in owners} & (named - NEEDED)
    }
    return sorted(modules | {"ray", "diffusers", "transformers", "huggingface_hub", "tokenizers"})


def run_alone(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    lines = f"REFUSED = set({refused()!r})\n{REFUSE}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", lines, str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model = tiny_model(torch.float32)
    video = VideoSpec(num_frames=9, height=32, width=32, fps=8)
    spec = ModelSpec(model.config, TextSpec("hashed", 6, 16), video=video)
    return save_model(tmp_path / "model", model, spec)


def test_the_list_of_refused_libraries_holds_the_heavy_ones() -> None:
    heavy = {"ray", "diffusers", "transformers", "pydantic", "mlflow"}
    heavy |= {"matplotlib", "av", "pyarrow", "PIL", "typer"}
    assert heavy <= set(refused())
    child = run_alone("import pydantic", ROOT)
    assert "No module named 'pydantic' (refused)" in child.stderr


def test_every_module_of_flow_imports_and_samples(model_folder: Path) -> None:
    child = run_alone(SAMPLE, model_folder)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "sampled\n"


def test_the_sampling_benchmark_runs(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    torch.save(released_state(model), tmp_path / "weights.pth")
    released_yaml(tmp_path / "config.yaml", **TINY)
    text, null = texts(model, 1, dtype=torch.float32)
    case = {
        "text": text,
        "text_null": null,
        "noise": randn(1, 3, 4, 2, 3, dtype=torch.float32),
        "deep_guided": randn(1, 3, 2, 3, 4, seed=1, dtype=torch.float32),
    }
    save_file(case, tmp_path / "case.safetensors")
    child = run_alone(BENCHMARK, tmp_path)
    # 1: it ran to its end, and random weights do not meet the bar.
    assert child.returncode in (0, 1), child.stderr
    assert "The bar is" in child.stdout, child.stderr
    assert "sequential" in child.stdout
