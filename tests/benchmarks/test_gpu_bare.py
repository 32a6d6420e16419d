"""Where there is only torch, einops, numpy and safetensors: the GPU benchmark's whole rehearsal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from benchmarks.gpu.codec import FEEDER_NEEDS
from benchmarks.gpu.parts import PARTS
from tests.benchmarks.gpu_runs import environment, rehearse
from tests.places import ROOT

pytestmark = pytest.mark.timeout(900)
NEEDED = ("torch", "einops", "numpy", "safetensors")
REFUSED = [
    "av", "diffusers", "fastapi", "httpx", "huggingface_hub", "matplotlib", "mlflow", "PIL",
    "pyarrow", "pydantic", "ray", "rich", "scipy", "sqlalchemy", "tokenizers", "transformers",
    "typer", "webdataset", "yaml",
]  # fmt: skip
OURS = (
    "flow",
    "benchmarks.gpu",
    "benchmarks.iteration",
    "flowreel.errors",
    "flowreel.files",
    "flowreel.values",
    "flowreel.version",
    "training.record.metrics",
    "training.objective",
)
"""All that the benchmark may import of this project: the list in the docstring of the package."""
PACKAGES = ("benchmarks", "flowreel", "training", "training.record")


def with_needs(names: tuple[str, ...]) -> set[str]:
    """Distributions and all that they need and is installed, without extras."""
    queue, distributions = [*names], set()
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in distributions:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        distributions.add(name)
        lines = [line for line in requires if "extra ==" not in line.replace("'", '"')]
        queue += [re.split(r"[^\w.-]", line.strip())[0] for line in lines]
    return distributions


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment that has those libraries, by links, and no others."""
    home = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    for name in with_needs(NEEDED):
        package = distribution(name)
        for file in package.files or []:
            top = file.parts[0]
            source = Path(str(package.locate_file(top)))
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(source)
    return str(home / "bin" / "python")


@pytest.fixture(scope="module")
def rehearsal(bare_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole rehearsal."""
    out = tmp_path_factory.mktemp("figures")
    run = rehearse(out, "--minutes", "60", python=bare_python)
    assert run.returncode == 0, run.stderr
    return out


def test_the_environment_is_bare(bare_python: str) -> None:
    code = (
        "import importlib.util as u, sys\n"
        f"assert all(u.find_spec(n) for n in {NEEDED})\n"
        f"sys.exit(' '.join(n for n in {REFUSED} if u.find_spec(n)) or 0)"
    )
    run = subprocess.run(
        [bare_python, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_every_part_of_the_rehearsal_is_complete(rehearsal: Path) -> None:
    parts = json.loads((rehearsal / "gpu.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {
        part.name: "complete" for part in PARTS
    }
    missing = {
        row["what"]: row["why"]
        for part in parts.values()
        for row in part["tables"].get("not measured", [])
    }
    # Nothing else: an error in any measurement would be a row here.
    assert missing == {
        "attention kernels": "there is one kernel on a CPU",
        "codec decode": "diffusers is not installed",
        "codec encode": "diffusers is not installed",
        "encoder's feeder": f"{', '.join(FEEDER_NEEDS)}: not installed",
    }
    (verdict,) = parts["right"]["tables"]["verdict"]
    assert verdict == {"compared": 36, "outside": 0, "verdict": "right"}


@pytest.mark.slow
def test_the_page_has_every_table(rehearsal: Path) -> None:
    page = (rehearsal / "gpu.md").read_text()
    assert "A rehearsal on a CPU at toy shapes" in page
    for part in PARTS:
        assert f"## {part.title}" in page
    parts = json.loads((rehearsal / "gpu.json").read_text())["parts"]
    for part in parts.values():
        assert part["rehearsal"] is True
        assert part["environment"]["torch"]
        for name, rows in part["tables"].items():
            assert f"### {name}" in page
            assert all(isinstance(row, dict) and row for row in rows)
    header = "| part | state | seconds | limit s | made | device | message |"
    assert page.count(header) == 1
    assert page.count("| complete |") == len(PARTS)


def test_it_imports_no_more_of_this_project_than_it_says(bare_python: str) -> None:
    """In an environment where nothing else could be imported, and by name."""
    files = sorted((ROOT / "benchmarks" / "gpu").glob("*.py"))
    names = [f"benchmarks.gpu.{path.stem}" for path in files if not path.stem.startswith("__")]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "print(*(n for n in sys.modules if n.split('.')[0] in sys.argv[1:]))"
    )
    ours = ("data_prep", "media", "pipeline", "serving", "flow", *PACKAGES)
    run = subprocess.run(
        [bare_python, "-c", code, *ours],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    modules = set(run.stdout.split()) - set(PACKAGES)
    outside = {n for n in modules if not any(n == o or n.startswith(f"{o}.") for o in OURS)}
    assert not outside
    docstring = (ROOT / "benchmarks" / "gpu" / "__init__.py").read_text()
    assert all(name.removeprefix("benchmarks.gpu") in docstring for name in OURS)
