"""What a schema says of its fields: kind, default, limits and description.

A schema is a pydantic model, or a plain dataclass that documents its fields by a string after each
or by a list under `Attributes:`. Knows nothing of any particular schema.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

REQUIRED = PydanticUndefined
"""The default of a field that must be given."""


@dataclass(frozen=True)
class SchemaField:
    """A field of a schema of either kind."""

    name: str
    annotation: Any
    metadata: tuple[Any, ...]
    default: Any
    description: str


def schema_fields(schema: type) -> Iterator[SchemaField]:
    """The fields of a schema, in its order."""
    documented = _documented(schema)
    if issubclass(schema, BaseModel):
        for name, info in schema.model_fields.items():
            yield SchemaField(
                name,
                info.annotation,
                tuple(info.metadata),
                info.get_default(call_default_factory=True, validated_data={}),
                info.description or documented.get(name, ""),
            )
        return
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        given = REQUIRED if default is dataclasses.MISSING else default
        yield SchemaField(field.name, hints[field.name], (), given, documented.get(field.name, ""))


def nested_schema(annotation: Any) -> type | None:
    """The schema of a section; None for a value."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if not isinstance(annotation, type):
        return None
    is_schema = issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    return annotation if is_schema else None


def _documented(schema: type) -> dict[str, str]:
    """What a class says of its fields: in a string after each, or under `Attributes:`."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    except (OSError, SyntaxError, ValueError):
        return {}
    assert isinstance(node, ast.ClassDef)
    said = {}
    _, _, listed = (inspect.getdoc(schema) or "").partition("Attributes:\n")
    for match in re.finditer(r"^    (\w+): (.+(?:\n {5,}.+)*)", listed, flags=re.MULTILINE):
        said[match.group(1)] = " ".join(match.group(2).split())
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            text = after.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                assert isinstance(field.target, ast.Name)
                said[field.target.id] = " ".join(text.value.split())
    return said


def summary(schema: type) -> str:
    """What a schema says of itself, in its first paragraph."""
    return " ".join((inspect.getdoc(schema) or "").partition("\n\n")[0].split())


_BOUNDS = {
    "ge": "minimum", "gt": "exclusive_minimum", "le": "maximum", "lt": "exclusive_maximum",
    "min_length": "minimum_length", "max_length": "maximum_length",
}  # fmt: skip


def allowed_values(annotation: Any, metadata: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
    """What a field takes: in words, and as limits for scripts.

    >>> from annotated_types import Ge, Lt
    >>> allowed_values(float | None, (Ge(0), Lt(1)))[0]
    'number from 0, less than 1; or null'
    >>> allowed_values(Literal["fp32", "bf16"], ())
    ('fp32, bf16', {'choices': ['fp32', 'bf16']})
    >>> allowed_values(tuple[int, int] | int, ())[0]
    '[whole number, whole number]; or whole number'
    """
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = (*metadata, *more)
    if get_origin(annotation) in (Union, types.UnionType):
        return _allowed_union(get_args(annotation), metadata)
    limits = _limits(metadata)
    if get_origin(annotation) is Literal:
        choices = list(get_args(annotation))
        return ", ".join(str(choice) for choice in choices), {"choices": choices}
    items = "characters" if annotation is str else "items"
    return _kind(annotation) + _range_words(limits, items), limits


def _allowed_union(
    members: tuple[Any, ...], metadata: tuple[Any, ...]
) -> tuple[str, dict[str, Any]]:
    words: list[str] = []
    limits: dict[str, Any] = {}
    for member in (m for m in members if m is not type(None)):
        text, own = allowed_values(member, metadata)
        words.append(text)
        limits |= own
    if type(None) in members:
        words.append("null")
        limits["nullable"] = True
    return "; or ".join(words), limits


def _limits(metadata: tuple[Any, ...]) -> dict[str, Any]:
    limits = {}
    for item in metadata:
        # pydantic keeps a rule as an object of its own kind, or several in one `FieldInfo`.
        rules = item.metadata if isinstance(item, FieldInfo) else [item]
        for rule in rules:
            for attribute, name in _BOUNDS.items():
                if getattr(rule, attribute, None) is not None:
                    limits[name] = getattr(rule, attribute)
    return limits


_KINDS = {bool: "true, false", int: "whole number", float: "number", str: "text", dict: "map"}


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"[{', '.join(_kind(part) for part in parts)}]"
    if origin in (tuple, list):
        return f"list of {_kind(parts[0])}"
    kind = origin or annotation
    return _KINDS.get(kind, getattr(kind, "__name__", str(kind)))


def _range_words(limits: dict[str, Any], items: str) -> str:
    """Limits as words, such as ` from 1 to 64`.

    >>> _range_words({"exclusive_minimum": 0, "maximum": 120}, "characters")
    ' more than 0, up to 120'
    """
    words, upper = [], limits.get("maximum")
    if "minimum" in limits:
        words.append(f"from {limits['minimum']}" + ("" if upper is None else f" to {upper}"))
    if "exclusive_minimum" in limits:
        words.append(f"more than {limits['exclusive_minimum']}")
    if upper is not None and "minimum" not in limits:
        words.append(f"up to {upper}")
    if "exclusive_maximum" in limits:
        words.append(f"less than {limits['exclusive_maximum']}")
    if "minimum_length" in limits:
        words.append(f"at least {limits['minimum_length']} {items}")
    if "maximum_length" in limits:
        words.append(f"at most {limits['maximum_length']} {items}")
    return " " + ", ".join(words) if words else ""
