"""A curriculum as data: stages that a run walks one after another.

A stage changes some of the run's settings and some of the model's shape; all else is as the recipe
says. Stages are relative to the recipe and not to each other, so that each can be read alone. Each
is a run of its own in a folder of its own that starts from the weights of the stage before
(`curriculum.py` walks them). Knows nothing of torch, Ray or files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, field_validator

from flow.config import ConfigError, FlowConfig
from training.config import TrainConfig
from training.sections import Section

STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


class StageConfig(Section):
    """One stage: its name, its length, and what it changes.

    >>> stage = StageConfig(name="short", steps=20, train={"batches": {"frames": 17}})
    >>> from flow.config import tiny
    >>> stage.resolve(tiny(), TrainConfig()).train.batches.frames
    17
    """

    name: str = Field(description="what the stage is called: a-z, 0-9, dots and hyphens")
    steps: int = Field(ge=1, description="optimizer steps of this stage")
    model: dict[str, Any] = Field(
        default={},
        description="what of `model` is different in this stage, such as layers_per_block; the "
        "weights of the stage before must grow into it",
    )
    train: dict[str, Any] = Field(
        default={},
        description="what of `train` is different in this stage, such as {batches: {frames: 17}}",
    )

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not STAGE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a stage: use a-z, 0-9, dots and hyphens")
        return name

    @field_validator("train")
    @classmethod
    def _steps_stand_once(cls, train: dict[str, Any]) -> dict[str, Any]:
        if "steps" in train:
            raise ValueError("the stage's own `steps` says how long it is; leave train.steps out")
        return train

    def resolve(self, flow: FlowConfig, train: TrainConfig) -> Stage:
        """The whole settings of this stage of a run.

        Raises:
            ValidationError, ConfigError: a key or value that the model or the run does not take.
        """
        changes = {**self.train, "steps": self.steps}
        settings = laid_over(train.model_dump(mode="json"), changes)
        shape = laid_over(flow.to_dict(), self.model)
        return Stage(self.name, FlowConfig.from_dict(shape), TrainConfig.model_validate(settings))


@dataclass(frozen=True)
class Stage:
    """A stage with nothing left to look up.

    Attributes:
        name: what it is called.
        flow: the model's shape.
        train: how it is trained.
    """

    name: str
    flow: FlowConfig
    train: TrainConfig


def laid_over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Maps in maps, with some keys changed.

    >>> laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    out = dict(values)
    for key, change in changes.items():
        old = out.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            out[key] = laid_over(old, change)
        else:
            out[key] = change
    return out


def resolved(
    stages: Sequence[StageConfig], flow: FlowConfig, train: TrainConfig
) -> tuple[Stage, ...]:
    """All stages of a run, whole.

    Raises:
        ValueError: two stages have one name, or a setting of one is wrong; the stage is named.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two stages are called {twice!r}; give each a name of its own")
    out = []
    for stage in stages:
        try:
            out.append(stage.resolve(flow, train))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in ("train", *first["loc"]))
            given = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
            raise ValueError(f"stage {stage.name!r}: {key}{given}: {first['msg']}") from error
        except ConfigError as error:
            raise ValueError(f"stage {stage.name!r}: model: {error}") from error
    return tuple(out)
