"""A tiny model folder whose samples are not trivial, with a tiny codec inside."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flow.codec import VideoCodec, build_vae, save_codec
from flow.flow import FlowModel
from flow.model_folder import ModelSpec, VideoSpec, save_model
from flow.text import TextSpec
from serving.loading import LoadedModel, load
from tests.flow.models import TINY
from tests.tiny_codec import CODEC

FPS = 8.0
TRAINED_FRAMES = 9
SIZE = 32


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # What the replicas use too: how a sum is split over threads shows in its last bits.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_codec(build_vae(CODEC), folder / "codec", half=False)
    config = TINY
    model = FlowModel(config)
    for name, weight in model.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(weight, std=0.1)
    spec = ModelSpec(
        flow=config,
        text=TextSpec(kind="hashed", length=6, dim=16),
        codec="codec",
        codec_digest=VideoCodec.load(folder / "codec").digest,
        video=VideoSpec(num_frames=TRAINED_FRAMES, height=SIZE, width=SIZE, fps=FPS),
    )
    out = folder / "tiny"
    save_model(out, model, spec, extra={"codec": folder / "codec"})
    shutil.rmtree(folder / "codec")
    return out


@pytest.fixture(scope="session")
def loaded(model_dir: Path) -> LoadedModel:
    return load(model_dir)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """A wide picture: uint8 [40, 90, 3]."""
    rows, columns = np.mgrid[0:40, 0:90]
    red = np.where((columns - 45) ** 2 + (rows - 20) ** 2 < 200, 230, 20)
    return np.stack([red, rows * 5, columns * 2], axis=-1).astype(np.uint8)
