"""Settings of training: sections refuse what they do not know; a resumption may change some."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tests.places import ROOT
from tests.training.world import small_config
from training.config import TrainConfig
from training.sections import FREE_ON_RESUME, Section

# What a resumed run may change: where and how long it computes, and what is recorded of it.
FREE = {
    "steps",
    "extend",
    "memory",
    "batches.accumulate",
    "batches.cache_bytes",
    "batches.prefetch",
    "optimizer.max_consecutive_skips",
    "checkpoints",
    "evaluation",
    "workers",
    "tracking",
}


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field by its path, sections and what is in them."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from fields(inner, f"{prefix}{name}.")


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for _name, field in fields(TrainConfig))


def test_what_may_change_on_resumption_is_marked_where_it_is_defined() -> None:
    marked = {name for name, field in fields(TrainConfig) if field.json_schema_extra}
    assert marked == FREE
    assert all(
        field.json_schema_extra in (None, FREE_ON_RESUME) for _name, field in fields(TrainConfig)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 7},
        {"batches": {"prefetch": True, "cache_bytes": 0, "accumulate": 2}},
        {"optimizer": {"max_consecutive_skips": 1}},
        {"checkpoints": {"every_steps": 1, "keep": 9}},
        {"evaluation": {"every_steps": 1, "clips": 2, "draws": 3}},
        {"memory": {"checkpointing": "full", "offload_optimizer": True}},
        {"workers": {"strategy": "fsdp", "count": 2, "threads": 3, "max_failures": 1}},
        {"tracking": {"enabled": True, "uri": "sqlite:///x.db", "every_steps": 1}},
    ],
)
def test_free_settings_are_no_part_of_the_trajectory(changes: dict[str, Any]) -> None:
    assert small_config(**changes).trajectory() == small_config().trajectory()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"precision": "bf16"},
        {"denoiser_from_step": 1},
        {"batches": {"first_frame_dropout": 0.5}},
        {"optimizer": {"adam_betas": (0.8, 0.95)}},
    ],
)
def test_all_other_settings_are(changes: dict[str, Any]) -> None:
    assert small_config(**changes).trajectory() != small_config().trajectory()


def test_settings_travel_as_plain_values() -> None:
    config = small_config(optimizer={"schedule_steps": 9})
    assert TrainConfig(**config.model_dump(mode="json")) == config


def test_sections_refuse_unknown_keys_and_changes() -> None:
    config = small_config()
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        TrainConfig(batches={"batch": 3})  # type: ignore[arg-type]
    for model in (config, config.batches, config.workers):
        assert isinstance(model, BaseModel)
        with pytest.raises(ValidationError, match="frozen"):
            model.seed = 3  # type: ignore[union-attr]


def test_settings_load_nothing_heavy() -> None:
    code = (
        "import sys\nimport training.config, training.codec.config\n"
        "bad = {'torch', 'numpy', 'pyarrow', 'ray', 'mlflow'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
