"""Every setting of a recipe and of `train-codec`, read from the schemas that check them.

For each: its key, unit or meaning, default, and what is allowed. `flowreel settings` prints them,
and `python -m pipeline.settings > docs/settings.md` writes the page of the documentation. How a
schema is read is in `pipeline.schema_fields`. Knows nothing of what a setting does.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flowreel.errors import FlowreelError
from pipeline.recipes import Recipe
from pipeline.schema_fields import REQUIRED, allowed_values, nested_schema, schema_fields, summary

CODEC_SECTION = "train-codec"
"""The section of the settings that are no part of a recipe."""
RECIPE_SECTION = "recipe"
"""The section of the keys that stand at the top of a recipe."""


class SettingsError(FlowreelError, ValueError):
    """A section or a setting that is not known."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        section: where it stands, such as `prepare.filters`.
        key: the whole key, as `--set` takes it.
        default: its value where nothing is said; `REQUIRED` where it must be given.
        allowed: which values are taken, in words.
        limits: the same for scripts: `choices`, `minimum`, `exclusive_maximum` and so on.
        description: what it is, with its unit.
    """

    section: str
    key: str
    default: Any
    allowed: str
    limits: dict[str, Any]
    description: str

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def default_text(self) -> str:
        """The default as a recipe writes it; sizes in bytes also in MiB or GiB."""
        if self.default is REQUIRED:
            return "must be given"
        text = yaml_text(self.default)
        if self.name.endswith("_bytes") and isinstance(self.default, int):
            text += _binary_size(self.default)
        return text

    def values(self) -> dict[str, Any]:
        """As plain values for `--json`."""
        required = self.default is REQUIRED
        return {
            "section": self.section,
            "key": self.key,
            "required": required,
            "default": None if required else self.default,
            "allowed": self.allowed,
            **self.limits,
            "description": self.description,
        }


@dataclass(frozen=True)
class Section:
    """Settings that stand together: its name, what it is about, and they."""

    name: str
    summary: str
    settings: tuple[Setting, ...]


def recipe_settings() -> list[Setting]:
    """Every setting of a recipe, in the order of the schema."""
    return [setting for section in _recipe_sections() for setting in section.settings]


def section_names() -> list[str]:
    """The sections, those inside others by their whole names."""
    return [*(section.name for section in _recipe_sections()), CODEC_SECTION]


def sections(wanted: str | None = None) -> list[Section]:
    """The sections of a name and those inside it, one setting by its key, or all.

    Raises:
        SettingsError: no section and no setting of that name.
    """
    if wanted == CODEC_SECTION:
        return [_codec_section()]
    if wanted is None:
        return [*_recipe_sections(), _codec_section()]
    named = [
        section
        for section in _recipe_sections()
        if section.name == wanted or section.name.startswith(f"{wanted}.")
    ]
    if named:
        return named
    for section in _recipe_sections():
        for setting in section.settings:
            if setting.key == wanted:
                return [dataclasses.replace(section, settings=(setting,))]
    known = [*section_names(), *(setting.key for setting in recipe_settings())]
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SettingsError(
        f"no section or setting {wanted!r}; {hint}the sections are {', '.join(section_names())}"
    )


def markdown() -> str:
    """The page of the documentation."""
    parts = [
        "# Settings",
        "",
        "Every setting of a recipe, and of `flowreel train-codec`. A recipe",
        "(`pipeline/recipes/*.yaml`) holds them by section; `--set key.path=value` changes one for",
        "one run, as in `--set train.steps=100`. `flowreel settings SECTION` prints the same.",
        "",
        "This page is written by `python -m pipeline.settings > docs/settings.md` from the schemas",
        "that check a recipe; a test compares the two.",
        "",
    ]
    for section in sections():
        parts += [f"## {section.name}", "", section.summary, ""]
        if section.name == CODEC_SECTION:
            parts += ["These belong to no recipe: `flowreel train-codec --set key=value`.", ""]
        parts += ["| setting | default | allowed | what it is |", "| --- | --- | --- | --- |"]
        parts += [
            f"| `{setting.name}` | {_code(setting.default_text, setting)} | "
            f"{_cell(setting.allowed)} | {_cell(setting.description)} |"
            for setting in section.settings
        ]
        parts.append("")
    return "\n".join(parts)


def _code(text: str, setting: Setting) -> str:
    if setting.default is REQUIRED:
        return "must be given"
    value, space, size = text.partition(" (")
    return f"`{_cell(value)}`" + (f" ({size}" if space else "")


def _cell(text: str) -> str:
    """Text for a cell of a table: a bar in it would begin the next cell."""
    return " ".join(text.split()).replace("|", "\\|")


@lru_cache(maxsize=1)
def _recipe_sections() -> tuple[Section, ...]:
    return tuple(_read(Recipe, "", None))


@lru_cache(maxsize=1)
def _codec_section() -> Section:
    from training.codec.config import CodecConfig

    (section,) = _read(CodecConfig, "", None)
    return dataclasses.replace(
        section,
        name=CODEC_SECTION,
        settings=tuple(
            dataclasses.replace(setting, section=CODEC_SECTION) for setting in section.settings
        ),
    )


def _read(schema: type, prefix: str, defaults: object) -> Iterator[Section]:
    """The section of a schema, then the sections inside it, in the schema's order."""
    own, inside = [], []
    for field in schema_fields(schema):
        key = f"{prefix}.{field.name}" if prefix else field.name
        default = getattr(defaults, field.name, field.default)
        nested = nested_schema(field.annotation)
        if nested is not None:
            inside.append((nested, key, None if default is REQUIRED else default))
            continue
        allowed, limits = allowed_values(field.annotation, field.metadata)
        own.append(
            Setting(prefix or RECIPE_SECTION, key, default, allowed, limits, field.description)
        )
    if own:
        yield Section(prefix or RECIPE_SECTION, summary(schema), tuple(own))
    for nested, key, default in inside:
        yield from _read(nested, key, default)


def yaml_text(value: object) -> str:
    """A value as a recipe writes it.

    >>> [yaml_text(value) for value in (None, True, 5e-05, (9, 17), "", "a folder")]
    ['null', 'true', '5e-05', '[9, 17]', '""', 'a folder']
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(yaml_text(item) for item in value)}]"
    return str(value) if value != "" else '""'


def _binary_size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size and count % size == 0:
            return f" ({count // size} {unit})"
    return ""


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.write(markdown())
