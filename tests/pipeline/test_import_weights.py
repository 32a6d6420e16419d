"""From a released checkpoint to a picture and a video: `import-weights`, then `sample`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flow.codec import LatentConvention, VideoCodec
from flow.flow import FlowModel
from flow.model_folder import load_model, read_spec
from media.read import read_video
from pipeline.cli import app
from serving.loading import load
from serving.session import prompt_text
from tests.flow.models import shaken, tiny_config
from tests.flow.released_models import released_state, released_yaml
from tests.flow.test_codec import SD, STATISTICS, WAN, made
from tests.flow.test_released_checkpoint import STRUCTURE, VIDEO
from tests.flow.tiny_t5 import byte_t5

PROMPT = "a red circle"
SIZES = {
    "channel_size": 4,
    "txt_size": 24,
    "channels": 32,
    "head_dim": 32,
    "layers_per_block": "1 1 2",
    "noise_std": 0.3,
}


def flowreel(*arguments: object, code: int = 0) -> str:
    """Output of a command, run in this process to spare its imports."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def released(folder: Path, yaml: dict[str, Any], **changes: object) -> tuple[object, ...]:
    """A tiny model as a release would be: .pth, --config, YAML, --out, model folder."""
    config = tiny_config(text_len=24, layers_per_block=(1, 1, 2), pos_len=4.0, **changes)
    model = FlowModel(config).eval()
    shaken(model, scale=0.5)
    torch.save(released_state(model), folder / "w.pth")
    released_yaml(folder / "c.yaml", **yaml, **SIZES)
    return folder / "w.pth", "--config", folder / "c.yaml", "--out", folder / "model"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_t5(tmp_path_factory.mktemp("t5"))


def test_image_release_becomes_a_model_that_paints_through_the_sd_vae(
    tmp_path: Path, text: Path
) -> None:
    codec = made(SD, tmp_path / "sd")
    yaml = STRUCTURE | {
        "img_size": 32,
        "vae": "stabilityai/sd-vae-ft-ema",
        "text": "google/flan-t5-xl",
    }
    command = released(tmp_path, yaml, video=False, denoiser=False)
    said = flowreel("import-weights", *command, "--codec", codec, "--text", text)
    assert "1 file" in said
    spec = read_spec(tmp_path / "model")
    assert spec.latents == LatentConvention.diffusers()
    assert spec.codec_digest == VideoCodec.load(codec).digest
    assert spec.video is not None
    assert (spec.video.num_frames, spec.video.height, spec.video.cell_pixels) == (1, 32, 8)
    assert spec.flow.pos_len == 4.0

    out = tmp_path / "picture.png"
    flowreel("sample", tmp_path / "model", "--prompt", PROMPT, "--guidance", 1, "--seed", 3,
             "--out", out, "--schedule", "sequential")  # fmt: skip
    with Image.open(io.BytesIO(out.read_bytes())) as picture:
        painted = np.asarray(picture)
    assert painted.shape == (32, 32, 3)
    # The same by hand: the noise, the flow's inverse, the convention, the library's own decoder.
    from flow.sample_spec import SampleSpec
    from flow.sampling import sample

    loaded = load(tmp_path / "model")
    assert loaded.text_encoder is not None
    assert loaded.codec is not None
    both = loaded.text_encoder.encode([PROMPT, ""])
    spec_ = SampleSpec(num_frames=1, grid=(4, 4), seed=3, guidance=1.0, schedule="sequential")
    with torch.inference_mode():
        x = sample(loaded.model, both[:1], both[1:], spec_, denoiser="none")
        signal = loaded.codec.vae.decode(x[:, 0] / 0.18215).sample[0]
    expected = ((signal.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(painted - expected).max() <= 1
    assert painted.std() > 1
    assert "holds a model already" in flowreel("import-weights", *command, code=2)


def test_video_release_becomes_a_model_that_makes_videos(tmp_path: Path, text: Path) -> None:
    codec = made(WAN | STATISTICS, tmp_path / "wan")
    yaml = VIDEO | {
        "img_size": 64, "vid_size": "9:8", "pt_seq_len": 4,
        "vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6",
    }  # fmt: skip
    command = released(tmp_path, yaml, prompt_fps=True)
    flowreel("import-weights", *command, "--codec", codec, "--text", text, "--dtype", "bf16")
    spec = read_spec(tmp_path / "model")
    assert spec.latents == LatentConvention.released(later_frame_scale=0.6)
    assert spec.video is not None
    assert (spec.video.num_frames, spec.video.fps, spec.video.cell_pixels) == (9, 8.0, 16)
    assert (spec.video.height, spec.video.width) == (48, 80)
    stored = torch.load(tmp_path / "w.pth", weights_only=True)["blocks.2.sos_embed"]
    assert torch.equal(load_model(tmp_path / "model")[0].flow.deep.sos, stored.bfloat16().float())

    loaded = load(tmp_path / "model")
    assert loaded.codec is not None
    # The codec's own statistics, the release's scale and noise.
    assert loaded.codec.convention == LatentConvention(
        tuple(STATISTICS["latents_mean"]), tuple(STATISTICS["latents_std"]), 0.6, True
    )
    prompt = prompt_text("a cat", loaded, num_frames=9)
    assert prompt.startswith("Noise Level 300:\nA video with 8 fps:\na cat\n")
    out = tmp_path / "video.mp4"
    flowreel("sample", tmp_path / "model", "--prompt", PROMPT, "--guidance", 1, "--out", out)
    frames = read_video(out).frames
    assert frames.shape == (9, 48, 80, 3)
    assert "a .mp4" in flowreel(
        "sample", tmp_path / "model", "--prompt", PROMPT, "--out", tmp_path / "x.png", code=2
    )
    flowreel("import-weights", *command, "--overwrite", "--text", "hashed", "--aspect", "1:1")
    again = read_spec(tmp_path / "model")
    assert again.codec == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    assert again.codec_digest is None
    assert again.text.kind == "hashed"
    assert again.video is not None
    assert (again.video.height, again.video.width) == (64, 64)


def test_imports_that_cannot_be_are_refused_and_leave_nothing(tmp_path: Path, text: Path) -> None:
    command = released(tmp_path, VIDEO | {"img_size": 64, "pt_seq_len": 4})
    other = made(
        WAN | {"z_dim": 6, "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}, tmp_path / "six"
    )
    assert "6 channels" in flowreel("import-weights", *command, "--codec", other, code=2)
    assert "--dtype 'fp8'" in flowreel("import-weights", *command, "--dtype", "fp8", code=2)
    assert "WIDTH:HEIGHT" in flowreel("import-weights", *command, "--aspect", "wide", code=2)
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    del state["blocks.0.sos_embed"], state["blocks.1.sos_embed"]
    torch.save(state, tmp_path / "w.pth")
    line = flowreel("import-weights", *command, code=2)
    assert "missing: blocks.0.sos_embed [1, 1, 4], blocks.1.sos_embed [1, 1, 4]" in line
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".model-*"))
