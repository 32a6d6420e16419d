"""Who may import whom: the table of DESIGN.md, read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

OURS = ("flowreel", "flow", "media", "data_prep", "training", "serving", "pipeline", "benchmarks")
SHARED = ("flowreel.errors", "flowreel.files", "flowreel.values")
"""Standard library only; every package may import them, and nothing else of `flowreel`."""
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "flowreel": OURS,
    "flow": ("flow",),
    "media": ("media",),
    "data_prep": ("data_prep", "flow", "media"),
    "training": ("training", "flow", "media", "data_prep.latents"),
    "serving": ("serving", "flow", "media", "training.checkpoint"),
    "pipeline": OURS,
    "benchmarks": ("benchmarks", "flow", "media", "data_prep", "training", "serving"),
}
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module named in an import anywhere in the file, `from a import b` as both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_what_its_folder_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        if name.split(".")[0] in OURS:
            allowed = (*MAY_IMPORT[package], *SHARED)
            assert any(within(name, a) for a in allowed), f"{path}: may not import {name}"
        if within(name, "ray"):
            assert package == "pipeline" or path.name == "on_ray.py", (
                f"{path}: Ray belongs in on_ray.py"
            )
        if ".on_ray" in name and path.name != "on_ray.py":
            assert package == "pipeline", f"{path}: only pipeline imports an on_ray.py"


@pytest.mark.parametrize("package", ["flow", "media"])
def test_networks_and_media_import_without_the_heavy_libraries(package: str) -> None:
    modules = [f"{package}.{p.stem}" for p in (ROOT / package).glob("*.py") if p.stem != "__init__"]
    code = (
        f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n"
        "bad = {'ray', 'diffusers', 'transformers', 'pydantic', 'mlflow'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nimport pipeline.cli\n"
        "bad = {'ray', 'torch', 'diffusers', 'transformers', 'mlflow', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
