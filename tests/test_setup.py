"""Set-up: the lock is whole, the choice of torch's build is kept, and the furniture is in order."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.places import ROOT
from tools import install
from tools.lock import CUDA, names_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
# A package may stand there twice, for older and newer Pythons: the last one that holds here counts.
LOCKED = dict(
    sorted(
        (
            (canonicalize_name(requirement.name), requirement)
            for line in re.findall(r"^[A-Za-z0-9][^\n\\]*", LOCK, flags=re.MULTILINE)
            for requirement in [Requirement(line)]
        ),
        key=lambda entry: entry[1].marker is None or entry[1].marker.evaluate(),
    )
)
PINS = {
    canonicalize_name(requirement.name): str(requirement.specifier)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    canonicalize_name(Requirement(text).name)
    for text in [*PROJECT["dependencies"], *EXTRAS["evaluate"], *EXTRAS["dev"]]
]


def test_every_direct_dependency_is_pinned_and_the_lock_has_the_pins() -> None:
    assert not set(DIRECT) - set(PINS), "pin it in constraints.txt, then run make lock"
    assert not set(PINS) - set(DIRECT), "constraints.txt pins what pyproject.toml does not name"
    locked = {name: str(LOCKED[name].specifier) for name in PINS if name != "torch"}
    assert locked == {name: pin for name, pin in PINS.items() if name != "torch"}, "run make lock"


def test_every_line_of_the_lock_is_one_version_with_hashes() -> None:
    for entry in re.split(r"^(?=[A-Za-z0-9])", LOCK, flags=re.MULTILINE)[1:]:
        assert re.match(r"[\w.-]+==[^\s*]+ ", entry), entry[:80]
        assert "--hash=sha256:" in entry, entry[:80]


def test_the_lock_names_no_build_of_torch_and_no_index() -> None:
    assert not [name for name in names_of(LOCK) if CUDA.fullmatch(name)]
    assert "://" not in LOCK


def test_this_environment_is_the_lock() -> None:
    """What was tested is what everybody gets, the closure of every dependency included."""
    wanted = {
        name: requirement
        for name, requirement in LOCKED.items()
        if requirement.marker is None or requirement.marker.evaluate()
    }
    wrong = {
        name: importlib.metadata.version(name)
        for name, requirement in wanted.items()
        if importlib.metadata.version(name) not in requirement.specifier
    }
    assert not wrong, "run make setup"
    assert importlib.metadata.version("torch").split("+")[0] == PINS["torch"].removeprefix("==")
    missing = {
        canonicalize_name(needed.name)
        for name in wanted
        for needed in map(Requirement, importlib.metadata.requires(name) or ())
        if needed.marker is None or needed.marker.evaluate({"extra": ""})
    } - {*wanted, "torch"}
    assert not missing, "run make lock"


def make(folder: Path, *arguments: str) -> str:
    """What make would run there, with pip unless uv is named."""
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    command = ["make", "--no-print-directory", "-n", "UV=", *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up reads of a checkout, in a folder whose path has a space."""
    folder = tmp_path / "my checkout"
    (folder / "tools").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "tools" / "install.py", folder / "tools")
    return folder


def test_the_build_is_chosen_once_and_kept(checkout: Path) -> None:
    assert "--torch cpu" in make(checkout, "test")
    assert "--torch gpu" in make(checkout, "setup", "GPU=1")
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "made-for-gpu").touch()
    assert "install.py" not in make(checkout, "test")
    assert "--torch cpu" in make(checkout, "setup", "GPU=0")
    assert "install.py" in make(checkout, "setup", "PYTHON=python3.12")
    os.utime(checkout / "requirements.lock", (2**32, 2**32))
    assert "--torch gpu" in make(checkout, "demo")


def test_both_commands_of_the_readme_use_the_lock(checkout: Path) -> None:
    for target in ("demo", "test"):
        assert "tools/install.py" in make(checkout, target)


class Recorder(install.Installer):
    """An installer that has torch from one source only, and remembers what it was asked for."""

    def __init__(self, source: str) -> None:
        super().__init__(Path("python"), "")
        self.source, self.asked = source, []  # type: ignore[var-annotated]

    def install(self, *arguments: str, by_pip: bool = False, quiet: bool = False) -> bool:
        self.asked.append(arguments)
        return self.source in arguments or (self.source == "default" and len(arguments) == 1)


@pytest.mark.parametrize(
    ("source", "tries"), [("--no-index", 1), ("--index-url", 2), ("default", 3)]
)
def test_the_cpu_build_is_taken_from_the_nearest_source(
    source: str, tries: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    installer = Recorder(source)
    install.install_torch(installer, "torch==1.0", "cpu", "https://example.org/cpu")
    assert len(installer.asked) == tries
    words = capsys.readouterr().out
    assert ("2700 MB" in words) == ("CUDA" in words) == (source == "default")


def test_nothing_to_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    with pytest.raises(SystemExit, match="could not be installed"):
        install.install_torch(Recorder("nowhere"), "torch==1.0", "gpu", "https://example.org/cpu")


def test_a_full_disk_is_refused_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        install.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 10**9)
    )
    with pytest.raises(SystemExit, match=r"1\.0 GB are free here, 3\.5 GB are needed"):
        install.check_room("cpu")


def test_an_old_python_is_refused_in_one_line() -> None:
    script = ROOT / "tools" / "install.py"
    code = (
        "import platform, runpy, sys\n"
        "sys.version_info = (3, 8, 18)\nplatform.python_version = lambda: '3.8.18'\n"
        f"runpy.run_path({str(script)!r})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("Flowreel needs Python 3.11 or newer, this is 3.8.18")
    assert process.stderr.count("\n") == 1


def test_a_wheel_has_recipes_assets_and_types_and_no_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = [path for path in (ROOT / "pipeline" / "assets").rglob("*") if path.is_file()]
    recipes = (ROOT / "pipeline" / "recipes").glob("*.yaml")
    wanted = {path.relative_to(ROOT).as_posix() for path in [*assets, *recipes]}
    assert not {*wanted, "flowreel/py.typed"} - names
    assert not [name for name in names if name.startswith(("tests", "tools"))]


def test_the_hook_is_make_check() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["make check"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert "2511.20462" in citation["references"][0]["url"]


def test_the_log_lists_every_decision_with_its_date() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    log = (ROOT / "LOG.md").read_text()
    for page in pages:
        number, title = re.match(r"# (\d{4}): (.+)", page.read_text()).groups()  # type: ignore[union-attr]
        date = re.search(r"^Date: (\d{4}-\d\d-\d\d)\. Status: ", page.read_text(), re.MULTILINE)
        assert date, f"{page.name} has no line of date and status"
        assert f"| [{number}](docs/decisions/{page.name}) | {date[1]} | {title} |" in log


@pytest.mark.parametrize("page", ["LOG.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(page: str) -> None:
    for file in [ROOT / page, *(ROOT / "docs" / "decisions").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
            assert "://" in target or (file.parent / target).exists(), f"{file.name}: {target}"
