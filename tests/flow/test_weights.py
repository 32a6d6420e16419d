"""Model folders: whole or not at all, and errors that name the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flow.weights as weights
from flow.codec import LatentConvention
from flow.config import ConfigError
from flow.flow import FlowModel
from flow.text import TextSpec
from flow.weights import (
    CheckpointError,
    ModelSpec,
    VideoSpec,
    import_released,
    load_model,
    read_spec,
    save_model,
)
from tests.flow.models import TINY, randn, texts, tiny_model

SPEC = ModelSpec(
    flow=TINY,
    text=TextSpec(kind="hashed", length=6, dim=16),
    codec="codec",
    codec_digest="abc",
    latents=LatentConvention(mean=(0.0,) * 4, std=(1.0,) * 4),
    video=VideoSpec(num_frames=17, height=64, width=64, fps=8),
)


@pytest.fixture
def model() -> FlowModel:
    return tiny_model(torch.float32)


def test_saved_model_comes_back_with_its_spec(tmp_path: Path, model: FlowModel) -> None:
    save_model(tmp_path / "m", model, SPEC)
    loaded, spec = load_model(tmp_path / "m")
    assert spec == SPEC == read_spec(tmp_path / "m")
    assert not loaded.training
    x, (text, _) = randn(1, 2, 4, 2, 2).float(), texts(model, 1, torch.float32)
    assert torch.equal(loaded.flow(x, text).z_BTHWC, model.flow(x, text).z_BTHWC)
    half, _ = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    loaded.flow(x, text).loss().backward()


def test_extra_files_arrive_with_the_model_and_a_model_is_replaced_whole(
    tmp_path: Path, model: FlowModel
) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "config.json").write_text("{}")
    save_model(tmp_path / "m", model, SPEC, extra={"codec": tmp_path / "codec"})
    assert (tmp_path / "m" / "codec" / "config.json").read_text() == "{}"
    save_model(tmp_path / "m", model, SPEC)
    assert not (tmp_path / "m" / "codec").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec", "m"]


def test_a_failing_save_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, model: FlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m", model, SPEC)
    before = load_file(tmp_path / "m" / "model.safetensors")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "_flush", full)
    for name in ("m", "new"):
        with pytest.raises(OSError, match="no space"):
            save_model(tmp_path / name, model, SPEC)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == before.keys()


def test_folders_that_are_no_models_are_left_alone(tmp_path: Path, model: FlowModel) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not a model"):
        save_model(tmp_path, model, SPEC)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_model(tmp_path)


def test_a_spec_of_another_structure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="structure"):
        save_model(tmp_path / "m", tiny_model(torch.float32, patch_size=2), SPEC)


def test_missing_extra_and_wrong_tensors_are_named_with_shapes(
    tmp_path: Path, model: FlowModel
) -> None:
    folder = save_model(tmp_path / "m", model, SPEC)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["flow.deep.sos"]
    tensors["flow.deep.extra"] = torch.zeros(2)
    tensors["denoiser.proj_in.weight"] = torch.zeros(3, 5)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as refusal:
        load_model(folder)
    message = str(refusal.value)
    assert "missing: flow.deep.sos [1, 1, 4]" in message
    assert "unexpected: flow.deep.extra [2]" in message
    assert "denoiser.proj_in.weight is [3, 5], needs [32, 4]" in message


def test_a_cut_file_and_a_foreign_config_are_refused(tmp_path: Path, model: FlowModel) -> None:
    folder = save_model(tmp_path / "m", model, SPEC)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cut short"):
        load_model(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(folder)
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    for changed, reason in (
        ({**fields, "colour": 1}, "colour"),
        ({**fields, "format": "other"}, "format"),
        ({**fields, "text": {"kind": "hashed", "size": 3}}, "size"),
    ):
        config.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=reason):
            read_spec(folder)
    config.write_text(json.dumps({**fields, "flow": {**fields["flow"], "widht": 3}}))
    with pytest.raises(ConfigError, match="widht"):
        read_spec(folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_spec(folder)


def _released_name(name: str) -> str:
    """The other direction of the importer, written out here on its own."""
    name = name.replace("flow.deep.", "blocks.3.").replace("flow.shallow.", "blocks.")
    name = name.replace("denoiser.", "learnable_self_denoiser.").replace(
        ".layers.", ".attn_blocks."
    )
    name = name.replace(".mlp.up.", ".mlp.main.0.").replace(".mlp.down.", ".mlp.main.2.")
    return name.replace(".sos", ".sos_embed")


YAML = """arguments:
- img_size: 4
- channel_size: 4
- txt_size: 6
- channels: 32
- head_dim: 32
- layers_per_block: 1 1 1 2
- noise_std: 0.3
- use_softplus: 1
- use_final_norm: 1
- soft_clip: 4
- shallow_block_local: 1
- learnable_self_denoiser: 1
- conditional_denoiser: 1
- temporal_causal: 2
"""


def test_released_checkpoint_is_imported_with_its_buffers_ignored(
    tmp_path: Path, model: FlowModel
) -> None:
    released = {_released_name(name): value for name, value in model.state_dict().items()}
    released |= {
        "var": torch.zeros(1),
        "blocks.0.attn_mask": torch.zeros(1),
        "feat_rope.freqs_cos": torch.zeros(1),
    }
    torch.save(released, tmp_path / "w.pth")
    (tmp_path / "c.yaml").write_text(YAML)
    imported, config = import_released(tmp_path / "w.pth", tmp_path / "c.yaml")
    assert (config.text_dim, config.denoiser_layers, config.denoiser_lookahead) == (16, 2, "every")
    assert imported.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(imported.state_dict()[k], v) for k, v in model.state_dict().items())
    save_model(tmp_path / "m", imported, ModelSpec(flow=config, text=SPEC.text))
    assert load_model(tmp_path / "m")[1].flow == config

    with pytest.raises(CheckpointError, match="text_dim"):
        import_released(tmp_path / "w.pth", tmp_path / "c.yaml", text_dim=99)
    del released["blocks.3.sos_embed"]
    torch.save(released, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"missing: flow\.deep\.sos"):
        import_released(tmp_path / "w.pth", tmp_path / "c.yaml")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("/")}, tmp_path / "w.pth")
    (tmp_path / "c.yaml").write_text(YAML)
    with pytest.raises(CheckpointError, match="not a plain tensor checkpoint"):
        import_released(tmp_path / "w.pth", tmp_path / "c.yaml")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        import_released(tmp_path / "none.pth", tmp_path / "c.yaml")
