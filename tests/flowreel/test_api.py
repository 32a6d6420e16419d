"""The front door: `import flowreel` costs nothing, and what it offers is what the commands do."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import flowreel
from flow.likelihood import draw_noise
from media.read import read_video
from media.write import encode_png
from serving.loading import LoadedModel
from serving.requests import Generation
from serving.session import generate, prompt_text
from tests.places import ROOT
from tests.serving.conftest import TRAINED_FRAMES, loaded, model_dir, picture

__all__ = ["loaded", "model_dir", "picture"]  # fixtures of the service's tests

PROMPT = "a red circle"
HEAVY = {
    "ray", "torch", "numpy", "pyarrow", "diffusers", "transformers", "mlflow", "pydantic", "rich",
    "typer",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(model_dir: Path) -> flowreel.Model:
    return flowreel.load(model_dir)


@pytest.fixture(scope="module")
def video(model: flowreel.Model) -> flowreel.Video:
    return model.sample(PROMPT, seed=7, certify=True)


def loaded_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys\nprint(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(ended.stdout.split())


def test_import_loads_nothing_that_is_not_asked_for() -> None:
    modules = loaded_by(
        "import flowreel\ndir(flowreel)\nflowreel.FlowreelError\nflowreel.__version__"
    )
    assert not HEAVY & modules
    ours = {"flow", "media", "data_prep", "training", "serving", "pipeline"}
    assert not ours & {name.split(".")[0] for name in modules}


def test_a_dataset_loads_neither_torch_nor_ray() -> None:
    assert not {"torch", "ray"} & loaded_by("import flowreel\nflowreel.LatentDataset")


def test_a_model_loads_no_ray() -> None:
    assert "ray" not in loaded_by("import flowreel\nflowreel.load, flowreel.Recipe")


def test_every_public_name_is_there_for_readers_and_for_type_checkers() -> None:
    assert set(dir(flowreel)) == set(flowreel.__all__)
    module = importlib.import_module("flowreel")
    tree = ast.parse(Path(module.__file__ or "").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == module._MODULE_OF
    assert {*typed, "__version__"} == set(flowreel.__all__)
    for name in typed:
        assert getattr(flowreel, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'samples'"):
        module.samples  # noqa: B018


def test_the_version_is_that_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    stated = settings["project"].get("version")
    if stated is None:
        stated = {"flowreel.__version__": flowreel.__version__}[
            settings["tool"]["setuptools"]["dynamic"]["version"]["attr"]
        ]
    assert flowreel.__version__ == stated
    assert (ROOT / "flowreel" / "py.typed").is_file()


TYPED = """
from typing import assert_type

import flowreel

model = flowreel.load("folder")
assert_type(model, flowreel.Model)
assert_type(model.sample("a prompt", num_frames=17), flowreel.Video)
assert_type(flowreel.sample(model, "a prompt").seed, int)
assert_type(flowreel.log_prob(model, "a.mp4", "a prompt").bits_per_dim, float)
assert_type(flowreel.load_recipe("tiny"), flowreel.Recipe)
assert_type(len(flowreel.LatentDataset("latents")), int)
with flowreel.serve("folder", port=0) as app:
    assert_type(app.url, str)
"""


@pytest.mark.soak
def test_editors_and_mypy_see_every_signature(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports"]
    ended = subprocess.run(
        [*command, "--config-file=", str(tmp_path / "typed.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_sample_is_the_video_that_the_service_makes(
    loaded: LoadedModel, video: flowreel.Video
) -> None:
    # The recipe's own sampler and guidance, as the command line has them.
    recipe = flowreel.load_recipe("tiny")
    guidance = recipe.serve.limits.default_guidance
    request = Generation(
        request_id="a", prompt=PROMPT, num_frames=TRAINED_FRAMES, seed=7, guidance=guidance
    )
    expected = generate(replace(loaded, sampling=recipe.sampler), request)
    np.testing.assert_array_equal(video.frames, expected.frames)
    assert video.fps == expected.fps
    assert video.counters == expected.counters
    assert video.certificate is not None
    assert 0 <= video.certificate.p999_abs <= video.certificate.max_abs < 1
    assert repr(video) == "Video(9 frames of 32x32 at 8 fps, seed 7, 'a red circle')"


def test_a_folder_samples_as_its_model_does(model_dir: Path, video: flowreel.Video) -> None:
    again = flowreel.sample(model_dir, PROMPT, seed=7)
    np.testing.assert_array_equal(again.frames, video.frames)
    assert again.certificate is None


def test_frames_are_handed_over_as_they_become_ready(
    model: flowreel.Model, video: flowreel.Video
) -> None:
    groups: list[np.ndarray] = []
    model.sample(PROMPT, seed=7, on_frames=groups.append)
    assert [len(group) for group in groups] == [1, 4, 4]
    np.testing.assert_array_equal(np.concatenate(groups), video.frames)


def test_a_given_first_frame_may_be_an_array_or_a_file(
    model: flowreel.Model, picture: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "first.png"
    path.write_bytes(encode_png(picture))
    continued = [model.sample(PROMPT, image=image, seed=1).frames for image in (picture, path)]
    np.testing.assert_array_equal(*continued)
    assert not np.array_equal(continued[0], model.sample(PROMPT, seed=1).frames)


def test_a_longer_video_slides_its_context(model: flowreel.Model) -> None:
    assert model.sample(PROMPT, num_frames=21).frames.shape == (21, 32, 32, 3)


def test_schedules_agree_when_nothing_is_tolerated(model_dir: Path) -> None:
    exact = flowreel.load(model_dir, recipe=flowreel.load_recipe("tiny", ["sampler.tolerance=0"]))
    schedules = ("jacobi", "sliding", "sequential")
    # Brightness differs by a step where the last bits fall on either side of a half.
    frames = [exact.sample(PROMPT, schedule=name).frames.astype(int) for name in schedules]  # type: ignore[arg-type]
    for other in frames[1:]:
        assert np.abs(other - frames[0]).max() <= 1


def test_videos_are_saved_whole_as_what_their_name_says(
    model: flowreel.Model, video: flowreel.Video, tmp_path: Path
) -> None:
    clip = read_video(video.save(tmp_path / "new" / "a.mp4"))
    assert clip.frames.shape == video.frames.shape
    assert clip.fps == pytest.approx(video.fps)
    still = model.sample(PROMPT, num_frames=1)
    assert still.save(str(tmp_path / "a.png")).read_bytes() == encode_png(still.frames[0])
    with pytest.raises(flowreel.FlowreelError, match="holds one frame; 9 frames need"):
        video.save(tmp_path / "b.png")
    with pytest.raises(flowreel.FlowreelError, match=r"must end in \.mp4"):
        video.save(tmp_path / "b.gif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "new"]


def test_log_prob_is_the_flows_own_on_the_noised_latents(
    model: flowreel.Model, loaded: LoadedModel, video: flowreel.Video
) -> None:
    likelihood = model.log_prob(video, PROMPT, draws=3, seed=4)
    assert loaded.codec is not None
    assert loaded.text_encoder is not None
    mean, _ = loaded.codec.encode(torch.from_numpy(video.frames)[None])
    x = loaded.codec.convention.to_model(mean)
    text = loaded.text_encoder.encode([prompt_text(PROMPT, loaded, len(video.frames))])
    noised = [x + 0.3 * draw_noise(4, draw, x.shape[1:]) for draw in range(3)]
    with torch.no_grad():
        nats = [float(loaded.model.flow(each, text).log_prob()) for each in noised]
    assert likelihood.nats == pytest.approx(np.mean(nats), rel=1e-5)
    assert likelihood.stderr == pytest.approx(np.std(nats, ddof=1) / 3**0.5, rel=1e-3)
    assert likelihood.dims == x.numel() == 3 * 4 * 2 * 2
    assert likelihood.bits_per_dim == pytest.approx(-likelihood.nats / likelihood.dims / np.log(2))
    nats_per_dim = likelihood.bits_per_dim * np.log(2)
    assert nats_per_dim - likelihood.loss == pytest.approx(0.5 * np.log(2 * np.pi))
    assert likelihood.floor == pytest.approx(0.5 + np.log(0.3))
    assert likelihood.draws == 3
    assert likelihood.frame_nats.shape == (3,)
    assert likelihood.token_nats.shape == (3, 2, 2)
    assert likelihood.frame_nats.sum() == pytest.approx(likelihood.nats)
    np.testing.assert_allclose(likelihood.token_nats.sum((1, 2)), likelihood.frame_nats)


def test_log_prob_takes_a_file_and_a_folder(
    model: flowreel.Model, model_dir: Path, video: flowreel.Video, tmp_path: Path
) -> None:
    path = video.save(tmp_path / "a.mp4")
    from_file = flowreel.log_prob(model_dir, path, PROMPT, draws=2)
    decoded = model.log_prob(read_video(path).frames, PROMPT, draws=2)
    assert from_file.nats == decoded.nats
    assert np.isnan(model.log_prob(video, PROMPT, draws=1).stderr)


def test_what_a_user_can_mend_has_one_root(
    model: flowreel.Model, video: flowreel.Video, tmp_path: Path
) -> None:
    (tmp_path / "video.mp4").write_bytes(b"no video")
    large = np.zeros((9, 48, 32, 3), np.uint8)
    mistakes = {
        "is not a model folder": lambda: flowreel.load(tmp_path),
        "recipe 'tinny': no such file": lambda: flowreel.load(model.folder, recipe="tinny"),
        "18 frames cannot be made": lambda: model.sample(PROMPT, num_frames=18),
        "0 frames cannot be made": lambda: model.sample(PROMPT, num_frames=0),
        "Guidance 99 is out of range": lambda: model.sample(PROMPT, guidance=99),
        "schedule": lambda: model.sample(PROMPT, schedule="fast"),  # type: ignore[arg-type]
        "gone.png cannot be read": lambda: model.sample(PROMPT, image=tmp_path / "gone.png"),
        "the codec takes 4k": lambda: model.log_prob(video.frames[:8], PROMPT),
        r"at most 9 frames of \[32, 32, 3\]": lambda: model.log_prob(large, PROMPT),
        "video": lambda: model.log_prob(tmp_path / "video.mp4", PROMPT),
        "no latent dataset": lambda: flowreel.LatentDataset(tmp_path),
        "unknown key": lambda: flowreel.load_recipe("tiny", ["train.stepz=3"]),
        "no shards at": lambda: flowreel.prepare("tiny", str(tmp_path / "gone"), tmp_path / "out"),
        "dataset.json is missing": lambda: flowreel.train("tiny", tmp_path, tmp_path / "out"),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(flowreel.FlowreelError, match=message):
            mistake()


INTERNAL = {"Damaged", "LockHeld", "PassingFailure", "Refusal"}
"""Errors that are caught where they are made, so no user meets them."""


def test_every_error_class_has_the_root_or_never_leaves_its_package() -> None:
    bases: dict[str, set[str]] = {}
    for package in ("flow", "media", "data_prep", "training", "serving", "pipeline", "flowreel"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    builtin = {"Exception", "ValueError", "RuntimeError", "OSError", "KeyError", "TypeError"}

    def ancestors(name: str) -> set[str]:
        above = bases.get(name, set())
        return above | {far for near in above for far in ancestors(near)}

    errors = {name for name in bases if builtin & ancestors(name) and name[0] != "_"} - INTERNAL
    rootless = {name for name in errors if "FlowreelError" not in {name, *ancestors(name)}}
    assert not rootless, f"{rootless}: derive from FlowreelError, or name it in INTERNAL"
