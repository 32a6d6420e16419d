"""`flowreel likelihood` on a real model folder: figures and files that agree."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flow.config import tiny
from flow.likelihood import NoiseFloorWarning, draw_noise
from pipeline.cli.options import show_warning
from pipeline.demo_figures import likelihoods
from pipeline.video_likelihood import (
    PerTokenFileError,
    VideoLikelihood,
    check_per_token_path,
    measure_likelihood,
    write_per_token,
)
from serving.loading import load
from serving.session import prompt_text
from tests.serving.conftest import (
    model_dir as model_dir,
)  # the tiny model folder of the service's tests
from tests.training.world import TEXT, write_dataset

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def measured(model_dir: Path, frames: np.ndarray) -> VideoLikelihood:
    return measure_likelihood(model_dir, frames, PROMPT, draws=3, seed=4)


def test_a_videos_loss_is_the_flows_on_its_noised_latents(
    model_dir: Path, frames: np.ndarray, measured: VideoLikelihood
) -> None:
    loaded = load(model_dir)
    assert loaded.codec is not None
    assert loaded.text_encoder is not None
    mean, _ = loaded.codec.encode(torch.from_numpy(frames)[None])
    text = loaded.text_encoder.encode([prompt_text(PROMPT, loaded, len(frames))])
    x = loaded.codec.convention.to_model(mean)
    losses = [
        float(loaded.model.flow(x + 0.3 * draw_noise(4, d, x.shape[1:]), text).loss())
        for d in range(3)
    ]
    assert float(measured.loss().mean) == pytest.approx(np.mean(losses), abs=1e-5)
    error = np.std(losses, ddof=1) / math.sqrt(3)
    assert float(measured.loss().standard_error) == pytest.approx(error, rel=1e-3)
    assert measured.floor == pytest.approx(0.5 + math.log(0.3))


def test_what_is_printed_names_both_constants_and_every_frame(measured: VideoLikelihood) -> None:
    nll, loss, floor, total = measured.lines()
    number = float(nll.split()[1])
    assert number - float(loss.split()[1]) == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-4)
    assert float(nll.split()[5]) == pytest.approx(number / math.log(2), abs=2e-4)
    assert "included" in nll
    assert "without ½ ln 2π" in loss
    assert floor.startswith("floor  -0.7040 nats/dim")
    dims = 3 * 4 * 4
    assert f"over {dims} dimensions" in total
    assert float(total.split()[3]) == pytest.approx(-number * dims, abs=0.1)
    rows = measured.frame_rows()
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "1-4"], ["2", "5-8"]]
    means = [float(row[2].split()[0]) for row in rows]
    assert np.mean(means) == pytest.approx(number, abs=1e-4)


def test_every_token_is_written_as_numbers_or_as_a_picture(
    measured: VideoLikelihood, frames: np.ndarray, tmp_path: Path
) -> None:
    write_per_token(tmp_path / "new" / "a.npz", measured, frames, PROMPT)
    with np.load(tmp_path / "new" / "a.npz") as saved:
        loss, nll = saved["loss_nats_DTHW"], saved["nll_nats_DTHW"]
        assert loss.shape == (3, 3, 2, 2)
        assert saved["token_pixels"] == 16
        assert (loss.sum((1, 2, 3)) / 48).mean() == pytest.approx(float(measured.loss().mean))
        np.testing.assert_allclose(nll - loss, saved["token_dim"] * 0.5 * math.log(2 * math.pi))
    write_per_token(tmp_path / "a.png", measured, frames, PROMPT)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert picture.size[0] > 500
    # The heat is coloured, the margins are white.
    assert (np.ptp(pixels.astype(int), axis=-1) > 60).mean() > 0.05
    assert (pixels == 255).all(-1).mean() > 0.1
    with pytest.raises(PerTokenFileError, match=r"a.jpg: must end in .npz or .png"):
        check_per_token_path(tmp_path / "a.jpg")


def test_the_demos_likelihoods_have_their_baselines(tmp_path: Path) -> None:
    """A start model is the identity: it hears no caption, and a Gaussian is no worse."""
    from flow.flow import FlowModel
    from flow.model_folder import ModelSpec, save_model

    root = write_dataset(tmp_path / "data", clips=160, images=0)
    torch.manual_seed(0)
    save_model(tmp_path / "model", FlowModel(tiny()), ModelSpec(tiny(), TEXT))
    found = likelihoods(tmp_path / "model", root, draws=2)
    loss = found["held_out_nats_per_dim"]
    assert found["shuffled_caption_nats_per_dim"] == pytest.approx(loss)
    assert found["noise_floor_nats_per_dim"] == pytest.approx(0.5 + math.log(0.3))
    assert found["noise_floor_nats_per_dim"] < found["gaussian_nats_per_dim"] < loss
    bits = (loss + 0.5 * math.log(2 * math.pi)) / math.log(2)
    assert found["held_out_nll_bits_per_dim"] == pytest.approx(bits)


def test_a_warning_of_ours_is_one_line_to_a_user(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show_warning
        warnings.warn("too good", NoiseFloorWarning, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)
    ours, *others = capsys.readouterr().err.splitlines()
    assert ours == "flowreel: warning: too good"
    assert "test_video_likelihood.py" in others[0]
