"""Who may import whom: the table of docs/architecture.md, read from the source, not run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

OURS = ("flowreel", "flow", "media", "data_prep", "training", "serving", "pipeline", "benchmarks")
SHARED = (
    "flowreel.errors", "flowreel.files", "flowreel.locks", "flowreel.values",
    "flowreel.version",
)  # fmt: skip
"""Standard library only; every package may import them, and nothing else of `flowreel`."""
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "flowreel": OURS,
    "flow": ("flow",),
    "media": ("media",),
    "data_prep": ("data_prep", "flow", "media"),
    "training": ("training", "flow", "media", "data_prep.latents", "data_prep.texts"),
    "serving": ("serving", "flow", "media", "training.state.checkpoint"),
    "pipeline": OURS,
    "benchmarks": ("benchmarks", "flow", "media", "data_prep", "training", "serving", "pipeline"),
}
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module named in an import of the file; `from a import b` is both `a` and `a.b`."""
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


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def first_circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, the first one again at the end; or none."""
    without_circle: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in without_circle:
            return []
        path.append(module)
        for other in sorted(imports[module]):
            if circle := visit(other):
                return circle
        without_circle.add(path.pop())
        return []

    return next((circle for module in sorted(imports) if (circle := visit(module))), [])


def test_the_search_for_circles_finds_one() -> None:
    assert first_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert first_circle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c", "b"]


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count, and those for type checking too."""
    modules = {module_of(path): path for path in FILES}
    imports = {}
    for module, path in modules.items():
        # `from a import b` is an import of the module a.b, or of the module a for its name b.
        names = {n if n in modules else n.rpartition(".")[0] for n in imports_of(path)}
        imports[module] = {name for name in names if name in modules and name != module}
    circle = first_circle(imports)
    assert not circle, " → ".join(circle)


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
        "import sys\nfrom pipeline.cli import app\n"
        "heavy = {'ray', 'torch', 'diffusers', 'transformers', 'mlflow', 'fastapi'}\n"
        "bad = heavy & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
