"""Every setting is listed and says what its schema really allows; the page is in step."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from pipeline.recipes import RecipeError, load_recipe
from pipeline.schema_fields import REQUIRED, allowed_values, schema_fields
from pipeline.settings import (
    Setting,
    SettingsError,
    markdown,
    recipe_settings,
    section_names,
    sections,
    yaml_text,
)
from tests.pipeline.command import flowreel
from tests.places import ROOT


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a resolved recipe; a map that is itself a value stays one."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        section = isinstance(value, dict) and (value or name in section_names())
        leaves |= flat(value, f"{name}.") if section else {name: value}
    return leaves


def test_the_page_is_what_the_schemas_say() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m pipeline.settings > docs/settings.md"


def test_the_page_is_written_whatever_the_locale() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.settings"],
        capture_output=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert ended.stdout.decode("utf-8") == markdown()
    assert flowreel("settings", "--markdown").stdout == markdown()


def test_the_settings_are_those_of_a_resolved_recipe() -> None:
    resolved = flat(load_recipe("tiny").model_dump(mode="json"))
    assert {setting.key for setting in recipe_settings()} == set(resolved)


def every_setting() -> list[Setting]:
    return [setting for section in sections() for setting in section.settings]


@pytest.mark.parametrize("setting", every_setting(), ids=lambda s: f"{s.section}:{s.name}")
def test_every_setting_says_what_it_is_and_what_is_allowed(setting: Setting) -> None:
    assert len(setting.description) > 2
    assert setting.allowed
    assert setting.default_text


@pytest.mark.parametrize(
    "setting",
    [s for s in recipe_settings() if {"minimum", "exclusive_minimum", "choices"} & set(s.limits)],
    ids=lambda s: s.key,
)
def test_what_is_said_to_be_refused_is_refused(setting: Setting) -> None:
    limits = setting.limits
    wrong = "no-such-choice" if "choices" in limits else None
    if wrong is None:
        wrong = limits.get("exclusive_minimum", limits.get("minimum", 0) - 1)
    with pytest.raises(RecipeError, match=setting.name):
        load_recipe("tiny", [f"{setting.key}={wrong}"])


def test_sections_are_found_by_name_by_part_and_by_key() -> None:
    assert [s.name for s in sections("serve")] == ["serve", "serve.limits", "serve.resources"]
    ((port,),) = (s.settings for s in sections("serve.port"))
    assert (port.key, port.default, port.limits["maximum"]) == ("serve.port", None, 65535)
    assert {s.section for s in sections("train-codec")[0].settings} == {"train-codec"}
    with pytest.raises(SettingsError, match=r"'serve\.prot'; did you mean 'serve\.port'"):
        sections("serve.prot")


def test_a_table_for_people_fits_the_terminal() -> None:
    ended = flowreel("settings", "serve", environment={"COLUMNS": "100"})
    assert ended.returncode == 0
    assert "null: 8000" in ended.stdout
    assert "interface to bind" in ended.stdout
    assert all(len(line) <= 100 for line in ended.stdout.splitlines())


class Inner(BaseModel):
    """What is inside."""

    share: float | None = Field(default=None, gt=0, le=1, description="a share")


@dataclasses.dataclass
class Plain:
    """A schema without pydantic.

    Attributes:
        size: how large,
            in pixels.
    """

    size: int
    kind: Literal["a", "b"] = "a"
    """which of the two"""


def test_schemas_of_either_kind_are_read() -> None:
    size, kind = schema_fields(Plain)
    assert (size.default, size.description) == (REQUIRED, "how large, in pixels.")
    assert (kind.default, kind.description) == ("a", "which of the two")
    (share,) = schema_fields(Inner)
    words, limits = allowed_values(share.annotation, share.metadata)
    assert words == "number more than 0, up to 1; or null"
    assert limits == {"exclusive_minimum": 0, "maximum": 1, "nullable": True}


def test_defaults_read_back_as_themselves() -> None:
    import yaml

    for setting in every_setting():
        if setting.default is not REQUIRED and not isinstance(setting.default, str):
            back = yaml.safe_load(yaml_text(setting.default))
            expected = setting.default
            if isinstance(back, str):  # YAML 1.1 takes 5e-05 for text; pydantic makes it a number
                back = float(back)
            assert back == (list(expected) if isinstance(expected, tuple) else expected)
