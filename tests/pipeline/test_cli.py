"""The command line as a user meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.command import PYTHON, flowreel, modules_after, one_line, refused
from tests.places import ROOT, TINY_CODEC

COMMANDS = (
    "demo", "submit", "prepare", "look", "inspect", "export", "merge-latents", "train", "sample",
    "watch", "track", "likelihood", "evaluate", "serve", "import-weights", "train-codec",
    "merge-adapter", "doctor", "settings", "plan",
)  # fmt: skip
HEAVY = {"torch", "ray", "diffusers", "transformers", "mlflow", "fastapi", "matplotlib"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What passes for a model folder until its weights are read."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"flow": {}}')
    (folder / "a.safetensors").touch()
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What passes for a dataset until it is opened."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "dataset.json").write_text("{}")
    return str(folder)


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code, modules, _ = modules_after("--help")
    assert code == 0
    assert not HEAVY & modules
    text = flowreel("--help").stdout
    assert all(f"│ {command} " in text for command in COMMANDS)
    assert "│ score" not in text, "an older name, kept but not shown"


def test_a_command_alone_prints_the_help() -> None:
    ended = flowreel()
    assert ended.returncode == 2
    assert "Usage: flowreel" in ended.stdout


def test_versions_are_said_without_importing_what_they_are_of() -> None:
    code, modules, _ = modules_after("--version")
    assert code == 0
    assert not HEAVY & modules
    said = flowreel("--version").stdout.split()
    for name in ("flowreel", "torch", "ray"):
        assert importlib.metadata.version(name) in " ".join(said)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text_and_every_command_an_example(command: str) -> None:
    code, modules, _ = modules_after(command, "--help")
    assert code == 0
    assert not HEAVY & modules
    from typer.main import get_command

    from pipeline.cli import app

    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    assert all(param.help for param in found.params), command
    assert found.epilog
    assert f"flowreel {command}" in found.epilog


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "/nonexistent", "-p", "x"], "/nonexistent: no such model folder"),
        (["sample", str(TINY_CODEC), "-p", "x"], "describes no flow"),
        (["sample", "docs", "-p", "x"], "docs is no model folder: it has no config.json"),
        (["sample", "MODEL", "-p", "x", "--out", "a.gif"], "must end in .mp4 or .png"),
        (["sample", "MODEL", "-p", "x", "--out", "/dev/null/a.mp4"], "/dev/null is a file"),
        (["sample", "MODEL", "-p", "x", "--image", "no.png"], "no.png: no such file"),
        (["sample", "MODEL", "-p", "x", "--schedule", "slidin"], "did you mean 'sliding'?"),
        (["sample", "MODEL", "-p", "x", "--denoiser", "best"], "one of learned, score, none"),
        (["sample", "MODEL", "-p", "x", "--frames", "0"], "--frames"),
        (["sample", "MODEL", "-p", "x", "--set", "sampler.tolerance=-1"], "sampler.tolerance"),
        (["sample", "MODEL"], "--prompt"),
        (["likelihood", "MODEL", "no.mp4", "-p", "x"], "no.mp4: no such file"),
        (["score", "MODEL", "docs", "-p", "x"], "docs is a folder; give a video"),
        (["evaluate", "MODEL", "--data", "docs"], "no latent dataset in docs"),
        (["evaluate", "MODEL", "--only", "nats,prompt"], "did you mean 'prompts'?"),
        (["evaluate", "MODEL", "--long", "30,soon"], "--long 'soon': must be seconds above 0"),
        (["evaluate", "MODEL", "--out", "README.md"], "--out README.md is a file"),
        (["evaluate", "MODEL", "--schedule", "slidin"], "did you mean 'sliding'?"),
        (["serve", "MODEL", "--data-dir", "README.md"], "--data-dir README.md is a file"),
        (["serve", "MODEL", "--port", "70000"], "--port"),
        (["train", "--data", "no-data", "--out", "OUT"], "no-data: no such folder"),
        (["train", "--data", "DATA", "--out", "README.md"], "--out README.md is a file"),
        (["train", "--data", "DATA", "--out", "OUT", "--recipe", "no.yaml"], "no.yaml"),
        (["train", "--data", "DATA", "--out", "OUT", "--set", "train.stepz=5"], "train.stepz = 5"),
        (["prepare", "--out", "OUT"], "--shards is missing"),
        (["prepare", "--out", "OUT", "--shards", "no-shards"], "no-shards"),
        (["prepare", "--out", "OUT", "--only", "latents"], "must be one of captions"),
        (["prepare", "--out", "OUT", "--only", "captions"], "OUT: no such folder"),
        (["prepare", "--out", "OUT", "--only", "text"], "OUT: no such folder"),
        (["prepare", "--out", "DATA", "--only", "text", "--shards", "docs"], "leave it out with"),
        (["prepare", "--out", "README.md/x", "--shards", "docs"], "README.md is a file"),
        (["prepare", "--out", "OUT", "--shards", "ftp://h/0.tar"], "ftp:// is not read; give"),
        (["prepare", "--out", "OUT", "--shards", "https://me:pw@h/0.tar"], "into ~/.netrc"),
        (["prepare", "--out", "OUT", "--shards", "hf://o/n/0.tar"], "hf://datasets/OWNER/NAME"),
        (["prepare", "--out", "https://h/o", "--shards", "docs"], "from the web only shards"),
        (["watch", "no-run"], "no-run: no such folder"),
        (["track", "docs"], "docs is no training run"),
        (["look", "no.mp4"], "no.mp4: no such file"),
        (["look", "README.md", "--recipe", "no.yaml"], "no.yaml"),
        (["inspect", "docs"], "no latent dataset in docs"),
        (["export", "DATA", "--out", "OUT", "--split", "trian"], "did you mean 'train'?"),
        (["merge-latents", "DATA", "docs", "--out", "OUT"], "no latent dataset in docs"),
        (["merge-latents", "DATA", "DATA", "--out", "README.md"], "--out README.md is a file"),
        (["import-weights", "no.pth", "--config", "no.yaml", "--out", "OUT"], "no.pth: no such"),
        (["train-codec", "--out", "README.md"], "--out README.md is a file"),
        (["submit", "tiny", "--address", "http://127.0.0.1:1", "--stage", "trian"], "'train'?"),
        (["submit", "tiny", "--address", "http://127.0.0.1:1"], "--out on storage"),
        (["demo", "--out", "OUT", "--address", "127.0.0.1:1"], "nothing answers there"),
        (["demo", "--out", "README.md"], "--out README.md is a file"),
        (["doctor", "--recipe", "no-recipe"], "no-recipe"),
        (["plan", "tiny", "--hardware", "abacusx3"], "known kinds: h100, h200"),
        (["demo", "-q", "-v"], "--quiet and --verbose are both given"),
        (["-q", "demo", "--verbose"], "--quiet and --verbose are both given"),
        (["sampel"], "Did you mean 'sample'?"),
    ],
)
def test_a_wrong_argument_is_one_line_before_anything_heavy_is_imported(
    model: str, data: str, tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = str(tmp_path / "OUT")
    places = {"MODEL": model, "DATA": data, "OUT": out}
    code, modules, stderr = modules_after(*(places.get(part, part) for part in arguments))
    assert code == 2, stderr
    assert said in one_line(stderr)
    assert not HEAVY & modules
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_an_existing_device_is_never_replaced(data: str) -> None:
    assert "no ordinary file" in refused("inspect", data, "--page", "/dev/null")


def test_a_missing_permission_is_said(model: str, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    assert "no permission" in refused("train-codec", "--out", str(tmp_path / "codec"))


def test_an_unknown_codec_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"\0" * 10240)
    out = tmp_path / "out"
    line = refused("prepare", "--shards", str(tmp_path), "--codec", "nonsense", "--out", str(out))
    assert "unknown codec 'nonsense'" in line
    assert not out.exists()


def test_train_codec_names_an_unknown_setting(tmp_path: Path) -> None:
    line = refused("train-codec", "--out", str(tmp_path / "codec"), "--set", "learning_rat=1")
    assert "did you mean learning_rate?" in line
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_said() -> None:
    address = ("--address", "http://127.0.0.1:1")
    assert "127.0.0.1:1" in refused("submit", "tiny", *address, "--", "--out", "/nowhere")


def test_a_model_folder_that_only_looks_like_one_is_refused_by_its_reader(model: str) -> None:
    assert "format = None" in refused("sample", model, "--prompt", "x")


def test_a_fault_of_the_code_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, pipeline.settings\nfrom pipeline.cli import main\n"
        "pipeline.settings.sections = lambda wanted: 1 / 0\n"
        "sys.argv = ['flowreel', 'settings']\nsys.exit(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr.splitlines()[-1]


def test_verbose_shows_the_traceback_behind_a_line() -> None:
    for arguments in (["-v", "settings", "nope"], ["settings", "nope", "--verbose"]):
        ended = flowreel(*arguments)
        assert ended.returncode == 2
        first, *_, last = ended.stderr.splitlines()
        assert first.startswith("Traceback")
        assert last.startswith("flowreel: no section or setting 'nope'")


def test_json_is_alone_on_standard_output() -> None:
    for arguments in (["settings", "serve", "--json"], ["-q", "settings", "serve", "--json"]):
        ended = flowreel(*arguments)
        settings = json.loads(ended.stdout)
        assert {setting["section"] for setting in settings} >= {"serve", "serve.limits"}
        assert not ended.stderr


def completions(*words: str) -> list[str]:
    """What the shell is offered for the last word."""
    ended = subprocess.run(
        PYTHON,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={
            **os.environ,
            "_FLOWREEL_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(["flowreel", *words]),
            "COMP_CWORD": str(len(words)),
        },
    )
    assert not ended.stderr
    return ended.stdout.split()


def test_completion_knows_recipes_choices_sections_and_settings() -> None:
    assert "tiny" in completions("demo", "--recipe", "t")
    assert completions("sample", "m", "--schedule", "s") == ["sliding", "sequential"]
    assert completions("sample", "m", "--denoiser", "l") == ["learned"]
    assert completions("import-weights", "w", "--dtype", "b") == ["bf16"]
    assert "serve.limits" in completions("settings", "serve.l")
    assert "serve.port=" in completions("demo", "--set", "serve.p")
    assert completions("prepare", "--only", "c") == ["captions"]


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "ru"],
        ["sample", "m", "--image", "ru"],
        ["sample", "m", "--out", "ru"],
        ["train", "--data", "ru"],
        ["look", "ru"],
        ["look", "a.mp4", "--out", "ru"],
        ["inspect", "ru"],
        ["prepare", "--shards", "ru"],
        ["demo", "--out", "ru"],
    ],
)
def test_completion_leaves_paths_to_the_shell(words: list[str]) -> None:
    # Where a command offers nothing, bash, zsh and fish complete file names by themselves.
    assert completions(*words) == []


def test_the_dtypes_of_imported_weights_are_written_once() -> None:
    from pipeline.cli.arguments import DTYPES
    from pipeline.import_released import DTYPES as KNOWN

    assert tuple(KNOWN) == DTYPES
