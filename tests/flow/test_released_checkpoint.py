"""Released checkpoints: every published name at full size, little memory for any file.

Refusals name everything that does not fit.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flow.config import PRESETS, ConfigError
from flow.flow import FlowModel
from flow.model_folder import CheckpointError, load_model
from flow.released_checkpoint import import_released, open_released
from flow.released_yaml import ReleasedNotes, read_notes
from tests.flow.models import tiny_model
from tests.flow.released_models import (
    billions,
    released_shapes,
    released_state,
    released_yaml,
    sparse_checkpoint,
)
from tests.places import ROOT

STRUCTURE = {
    "patch_size": 1, "nvp": 1, "rope": 1, "adaln": 0, "sos": 1, "seq_order": "L2R",
    "use_softplus": 1, "cond_top_only": 1, "use_final_norm": 1, "soft_clip": 4, "lr": "5e-5",
}  # fmt: skip
VIDEO = STRUCTURE | {
    "shallow_block_local": 1, "learnable_self_denoiser": 1, "conditional_denoiser": 1,
    "denoiser_window": 10, "temporal_causal": 2, "fps_cond": 1, "mix_aspect": 1,
    "cond_noise_level": 1,
}  # fmt: skip
VIDEO_7B = VIDEO | {
    "img_size": 640, "txt_size": 256, "vid_size": "81:16", "channel_size": 48, "channels": 3072,
    "top_block_channels": 4096, "blocks": 6, "layers_per_block": "2 2 2 2 2 24", "noise_std": 0.5,
    "pt_seq_len": 32,
    "vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6", "text": "google/flan-t5-xl",
}  # fmt: skip
IMAGE_3B = STRUCTURE | {
    "img_size": 256, "txt_size": 128, "channel_size": 4, "channels": 3072, "blocks": 6,
    "layers_per_block": "2 2 2 2 2 24", "noise_std": 0.3, "vae": "stabilityai/sd-vae-ft-ema",
    "text": "google/flan-t5-xl",
}  # fmt: skip
TINY = VIDEO | {
    "img_size": 4, "channel_size": 4, "txt_size": 6, "channels": 32, "head_dim": 32,
    "layers_per_block": "1 1 1 2", "noise_std": 0.3, "fps_cond": 0, "mix_aspect": 0,
    "cond_noise_level": 0,
}  # fmt: skip


def test_every_name_of_the_7b_release_finds_its_place(tmp_path: Path) -> None:
    shapes = released_shapes(
        channels=48,
        shallow=3072,
        deep=4096,
        layers=(2, 2, 2, 2, 2, 24),
        text=2048,
        denoiser_layers=8,
    )
    path = sparse_checkpoint(tmp_path / "7b.pth", shapes)
    assert path.stat().st_size > 27e9
    assert path.stat().st_blocks * 512 < 1e8, "the file system makes no holes"
    released = open_released(path, released_yaml(tmp_path / "7b.yaml", **VIDEO_7B))
    assert released.config == PRESETS["video-7b"]()
    with torch.device("meta"):
        model = FlowModel(released.config)
    model.load_state_dict(released.tensors, assign=True)
    assert model.denoiser is not None
    parts = (model, model.flow.deep, model.flow.shallow, model.denoiser)
    assert [billions(part) for part in parts] == [6.89, 4.84, 1.14, 0.91]


def test_every_name_of_the_3b_release_finds_its_place(tmp_path: Path) -> None:
    shapes = released_shapes(
        channels=4, shallow=3072, deep=3072, layers=(2, 2, 2, 2, 2, 24), text=2048
    )
    path = sparse_checkpoint(tmp_path / "3b.pth", shapes)
    released = open_released(path, released_yaml(tmp_path / "3b.yaml", **IMAGE_3B))
    assert released.config == PRESETS["image-3b"]()
    assert released.config.pos_len == 256 / 8
    assert round(sum(v.numel() for v in released.tensors.values()) / 1e9, 2) == 3.86


def test_the_yaml_names_codec_text_encoder_and_video(tmp_path: Path) -> None:
    notes = read_notes(released_yaml(tmp_path / "7b.yaml", **VIDEO_7B))
    assert notes == ReleasedNotes(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers", 0.6, "google/flan-t5-xl", 81, 16.0, 640
    )
    notes = read_notes(released_yaml(tmp_path / "3b.yaml", **IMAGE_3B))
    assert (notes.vae, notes.later_frame_scale) == ("stabilityai/sd-vae-ft-ema", 1.0)
    assert (notes.num_frames, notes.fps) == (1, 0.0)
    with pytest.raises(ConfigError, match="FRAMES:FPS"):
        read_notes(released_yaml(tmp_path / "c.yaml", vid_size="long"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny released model: its .pth and its YAML."""
    torch.save(released_state(tiny_model(torch.float32)), tmp_path / "w.pth")
    return tmp_path / "w.pth", released_yaml(tmp_path / "c.yaml", **TINY)


def test_checkpoint_is_imported_with_its_buffers_ignored(
    tmp_path: Path, checkpoint: tuple[Path, Path]
) -> None:
    expected = tiny_model(torch.float32).state_dict()
    imported, config = import_released(*checkpoint)
    assert (config.text_dim, config.denoiser_layers, config.denoiser_lookahead) == (16, 2, "every")
    assert imported.state_dict().keys() == expected.keys()
    assert all(torch.equal(imported.state_dict()[k], v) for k, v in expected.items())
    with pytest.raises(CheckpointError, match="text_dim"):
        import_released(*checkpoint, text_dim=99)


def test_every_tensor_that_does_not_fit_is_named_with_its_shapes_in_one_message(
    tmp_path: Path,
) -> None:
    state = released_state(tiny_model(torch.float32))
    removed = [name for name in state if "blocks.1.attn_blocks.0" in name]
    for name in removed:
        del state[name]
    state |= {f"ema.{i}": torch.zeros(i + 1, 2) for i in range(5)}
    wrong = [f"blocks.3.attn_blocks.{i}.mlp.main.0.weight" for i in range(2)]
    state |= dict.fromkeys(wrong, torch.zeros(7, 3))
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as refusal:
        open_released(tmp_path / "w.pth", released_yaml(tmp_path / "c.yaml", **TINY))
    message = str(refusal.value)
    assert len(removed) == 12
    assert all(f"{name} [" in message for name in removed)
    assert all(f"ema.{i} [{i + 1}, 2]" in message for i in range(5))
    assert all(f"{name} is [7, 3], needs [128, 32]" in message for name in wrong)
    assert message.index("missing: ") < message.index("unexpected: ")
    assert message.index("unexpected: ") < message.index("of another shape: ")


def test_files_that_cannot_be_mapped_or_are_no_state_dicts_are_refused(tmp_path: Path) -> None:
    config, path = released_yaml(tmp_path / "c.yaml", **TINY), tmp_path / "w.pth"

    def refusal() -> str:
        with pytest.raises(CheckpointError) as refused:
            open_released(path, config)
        return str(refused.value)

    assert "no checkpoint at" in refusal()
    torch.save({"model": Path("/")}, path)
    assert "not a plain tensor checkpoint" in refusal()
    state = released_state(tiny_model(torch.float32))
    torch.save({"model": state, "step": 3}, path)
    assert "'model' is a dict; save the state dict alone" in refusal()
    torch.save([torch.zeros(1)], path)
    assert "holds a list" in refusal()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert "write it again" in refusal()
    # What the message advises works.
    torch.save(torch.load(path, map_location="cpu", weights_only=True), tmp_path / "new.pth")
    assert open_released(tmp_path / "new.pth", config).config.num_blocks == 4
    whole = (tmp_path / "new.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a plain tensor checkpoint" in refusal()


def _anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process now; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_import_of_several_gigabytes_holds_under_two_and_the_largest_tensor(tmp_path: Path) -> None:
    shapes = released_shapes(channels=8, shallow=512, deep=4096, layers=(1, 4), text=64)
    sparse_checkpoint(tmp_path / "w.pth", shapes)
    size = (tmp_path / "w.pth").stat().st_size
    assert size > 3e9
    rows = STRUCTURE | {"img_size": 8, "channel_size": 8, "txt_size": 8, "channels": 512}
    rows |= {"top_block_channels": 4096, "layers_per_block": "1 4", "noise_std": 0.3}
    config = released_yaml(tmp_path / "c.yaml", **rows)
    command = [
        sys.executable, "-m", "pipeline.cli", "import-weights", str(tmp_path / "w.pth"),
        "--config", str(config), "--out", str(tmp_path / "model"), "--dtype", "bf16",
    ]  # fmt: skip
    peak = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            peak = max(peak, _anonymous_bytes(child.pid))
            time.sleep(0.005)
    assert child.returncode == 0
    largest = 4 * 4096 * 4 * 4096
    assert 0.5e9 < peak < 2e9 + largest, f"{peak / 1e9:.2f} GB of anonymous memory for {size} bytes"
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    model, spec = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert spec.flow.deep_width == 4096
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_imported_model_owns_its_weights_and_the_file_is_not_touched(
    checkpoint: tuple[Path, Path],
) -> None:
    before = checkpoint[0].read_bytes()
    model, _ = import_released(*checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    assert checkpoint[0].read_bytes() == before
    checkpoint[0].chmod(0o444)
    assert open_released(*checkpoint).config == model.config
