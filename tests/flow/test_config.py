"""The configuration refuses what cannot be built, in one line, and survives its own formats."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import pytest
import torch

from flow.config import PRESETS, ConfigError, FlowConfig
from flow.flow import FlowModel
from flow.released_yaml import read_structure
from tests.flow.models import TINY, tiny_config


def test_round_trips_through_json() -> None:
    assert FlowConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latent_channels", 0),
        ("patch_size", -1),
        ("head_dim", 18),
        ("head_dim", 16),
        ("shallow_width", 33),
        ("deep_width", 48),
        ("layers_per_block", ()),
        ("layers_per_block", (1, 0)),
        ("layers_per_block", (1, 1.5)),
        ("noise_std", 0.0),
        ("noise_std", float("nan")),
        ("pos_len", -1.0),
        ("soft_clip", -4.0),
        ("denoiser_window", 0),
        ("denoiser_lookahead", "twice"),
        ("video", 1),
        ("text_len", "6"),
        ("denoiser_layers", True),
    ],
)
def test_bad_value_is_refused_in_one_line_that_names_key_and_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as refusal:
        tiny_config(**{key: value})
    message = str(refusal.value)
    assert key in message
    assert repr(value) in message
    assert "\n" not in message


def test_unknown_and_missing_keys_are_refused_by_name() -> None:
    fields = TINY.to_dict()
    with pytest.raises(ConfigError, match="'deep_widht'"):
        FlowConfig.from_dict({**fields, "deep_widht": 3})
    del fields["deep_width"]
    with pytest.raises(ConfigError, match="'deep_width'"):
        FlowConfig.from_dict(fields)


def test_pydantic_recipe_can_hold_it_and_refuses_unknown_keys() -> None:
    adapter = pydantic.TypeAdapter(FlowConfig)
    assert adapter.validate_python(TINY.to_dict()) == TINY
    with pytest.raises(pydantic.ValidationError, match="extra_key"):
        adapter.validate_python({**TINY.to_dict(), "extra_key": 1})
    with pytest.raises(pydantic.ValidationError, match="head_dim"):
        adapter.validate_python({**TINY.to_dict(), "head_dim": 18})


def _yaml(path: Path, **changes: object) -> Path:
    rows = {
        "img_size": 8,
        "channel_size": 4,
        "txt_size": 6,
        "channels": 32,
        "head_dim": 32,
        "blocks": 2,
        "layers_per_block": "1 2",
        "noise_std": 0.3,
        "lr": 1e-4,
        **changes,
    }
    lines = [f"- {key}: {json.dumps(value)}" for key, value in rows.items() if value is not None]
    path.write_text("arguments:\n" + "\n".join(lines) + "\n")
    return path


def test_released_yaml_gives_positions_from_the_image_size_in_cells(tmp_path: Path) -> None:
    path = _yaml(tmp_path / "config.yaml", img_size=256, patch_size=2)
    config = read_structure(path, text_dim=5, cells_per_img_size=16)
    assert config.pos_len == 8.0
    assert not config.video
    assert config.deep_width == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_order": "R2L"},
        {"nvp": 0},
        {"rope": 0},
        {"adaln": 1},
        {"cond_top_only": 0},
        {"blocks": 3},
        {"channels": None},
        {"learnable_self_denoiser": 1, "temporal_causal": 1},
    ],
)
def test_released_yaml_with_another_structure_is_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(reversed(changes)))):
        read_structure(_yaml(tmp_path / "config.yaml", **changes), text_dim=5)


def test_video_7b_preset_has_the_published_size() -> None:
    with torch.device("meta"):
        model = FlowModel(PRESETS["video-7b"]())
    assert model.denoiser is not None

    def billions(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e9, 2)

    assert billions(model) == 6.89
    assert billions(model.flow.deep) == 4.84
    assert billions(model.flow.shallow) == 1.14
    assert billions(model.denoiser) == 0.91


def test_image_3b_preset_builds_without_a_denoiser() -> None:
    with torch.device("meta"):
        model = FlowModel(PRESETS["image-3b"]())
    assert model.denoiser is None
