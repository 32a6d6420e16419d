"""Recipes: everything a run needs to know, in one YAML file that reads alone.

Each package owns its part of the schema; this file puts them together, finds recipes by name,
applies `key.path=value` overrides, and turns whatever is wrong into one line that names key, value
and what is allowed. Knows nothing of how any of it is carried out.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from data_prep.config import PrepareConfig
from data_prep.storage.store import open_folder
from data_prep.world.scene import SceneKinds
from flow.aspects import SizeError
from flow.codec_factors import HUB_ID, read_factors
from flow.config import FlowConfig
from flow.text_spec import TextSpec
from flowreel.errors import FlowreelError
from serving.config import Limits, Resources, SamplingConfig
from training.config import TrainConfig
from training.stage import Stage, StageConfig, resolved

if TYPE_CHECKING:
    from training.codec.config import CodecConfig
    from training.stated_video import StatedVideo

ASSETS = Path(__file__).parent / "assets"
RECIPES = Path(__file__).parent / "recipes"
TINY_CODEC = ASSETS / "tiny_codec"
SHAPES_CODEC = ASSETS / "shapes_codec"
SHIPPED_CODECS = {"shapes": SHAPES_CODEC, "tiny": TINY_CODEC}
"""Codecs that ship, by name: `shapes` draws the moving shapes (8 pixels to a cell); `tiny` has the
factors of Wan2.2's (16), knows only colours and places, and is quick."""
Schema = TypeVar("Schema", bound=BaseModel)


class RecipeError(FlowreelError, ValueError):
    """A recipe that cannot be read: the message is one line."""


class WorldConfig(BaseModel):
    """The moving shapes that the demo makes when no shards are given."""

    model_config = ConfigDict(extra="forbid")

    num_clips: int = Field(default=384, ge=1, description="video clips to write")
    num_images: int = Field(default=96, ge=0, description="images to write")
    clips_per_shard: int = Field(default=64, ge=1, description="samples per shard")
    height: int = Field(default=64, ge=16, multiple_of=2, description="pixels")
    width: int = Field(default=64, ge=16, multiple_of=2, description="pixels")
    frames: int = Field(default=36, ge=1, description="frames of a clip")
    fps: float = Field(default=16.0, gt=0, description="frames per second")
    kinds: SceneKinds = Field(default_factory=SceneKinds, description="which scenes there are")


class EvaluateConfig(BaseModel):
    """What is measured after training."""

    model_config = ConfigDict(extra="forbid")

    noise_draws: int = Field(
        default=4, ge=2, description="seeded noise draws behind every likelihood"
    )
    prompts: int = Field(
        default=48,
        ge=1,
        description="generated clips whose colour, shape, size and motion are read back",
    )


class ServeConfig(BaseModel):
    """The endpoint."""

    model_config = ConfigDict(extra="forbid")

    host: str = Field(
        default="127.0.0.1", description="interface to bind; loopback unless you say otherwise"
    )
    port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port; 0: a free one; null: 8000 in `flowreel serve`, a free one in the "
        "demo",
    )
    limits: Limits = Field(default_factory=Limits, description="what the service admits")
    resources: Resources = Field(
        default_factory=Resources, description="what each deployment takes"
    )


class ClusterConfig(BaseModel):
    """The Ray that a run starts for itself when it is given no address."""

    model_config = ConfigDict(extra="forbid")

    num_cpus: int | None = Field(
        default=None, ge=1, description="CPUs to offer; by default all of them"
    )
    object_store_mb: int = Field(
        default=512, ge=80, description="shared memory for blocks in flight, MB"
    )


class Recipe(BaseModel):
    """One run from shards to video."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="what the run is called in MLflow")
    codec: str = Field(
        default="tiny",
        description="'shapes' or 'tiny' (both ship here: 8 and 16 pixels to a cell), a folder, or "
        "a hub id",
    )
    world: WorldConfig = Field(default_factory=WorldConfig)
    prepare: PrepareConfig
    text: TextSpec
    model: FlowConfig
    train: TrainConfig
    stages: list[StageConfig] = Field(
        default=[],
        description="a curriculum: stages that training walks one after another, each from the "
        "weights of the one before; none: one stage, as `model` and `train` say",
    )
    sampler: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("codec")
    @classmethod
    def _codec_is_somewhere(cls, codec: str) -> str:
        if codec not in SHIPPED_CODECS and not Path(codec).is_dir() and not HUB_ID.fullmatch(codec):
            raise ValueError(
                f"unknown codec {codec!r}: allowed are 'shapes', 'tiny', a folder that exists, "
                "or a hub id (owner/name)"
            )
        return codec

    @model_validator(mode="after")
    def _stages_are_whole(self) -> Recipe:
        _ = self.curriculum
        return self

    @model_validator(mode="after")
    def _text_fits_model(self) -> Recipe:
        if (self.text.length, self.text.dim) != (self.model.text_len, self.model.text_dim):
            raise ValueError(
                f"text makes {self.text.length}x{self.text.dim} tokens, model reads "
                f"{self.model.text_len}x{self.model.text_dim}; make text.length = model.text_len "
                "and text.dim = model.text_dim"
            )
        return self

    @model_validator(mode="after")
    def _clips_fit_codec(self) -> Recipe:
        # A codec from a hub is asked when the run is planned: recipes are read without a network.
        if Path(self.codec_source).is_dir():
            try:
                self.prepare.bucket.check(read_factors(self.codec_source))
            except SizeError as error:
                raise ValueError(f"prepare.{error}") from error
        return self

    @property
    def curriculum(self) -> tuple[Stage, ...]:
        """The stages with nothing left to look up; none where training is of one piece."""
        return resolved(self.stages, self.model, self.train)

    @property
    def stated_video(self) -> StatedVideo:
        """What `prepare.bucket` states of the videos; what nobody gave is the dataset's to decide.

        With `aspects`, `sizes` or `resolutions` it states the sizes that these come to, and with
        `frame_counts` these, whoever gave the rest.
        """
        from training.stated_video import StatedVideo

        bucket = self.prepare.bucket
        names = bucket.model_fields_set & {"num_frames", "height", "width", "fps"}
        stated: dict[str, Any] = {name: getattr(bucket, name) for name in names}
        if bucket.frame_counts:
            stated.pop("num_frames", None)
            stated["frame_counts"] = bucket.lengths
        if bucket.aspects or bucket.sizes or bucket.resolutions:
            stated.pop("height", None)
            stated.pop("width", None)
            stated["sizes"] = tuple(bucket.all_sizes(read_factors(self.codec_source).space))
        return StatedVideo(**stated)

    @property
    def codec_source(self) -> str:
        """The folder or hub id behind `codec`."""
        return str(SHIPPED_CODECS.get(self.codec, self.codec))


def recipe_names() -> list[str]:
    """The recipes that ship with Flowreel."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a name (`tiny`) or path, with `key.path=value` overrides laid over it.

    Raises:
        RecipeError: no such file, no YAML, an unknown key or a bad value; always one line.
    """
    path = Path(source)
    if not path.is_file() and source in recipe_names():
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"recipe {source!r}: no such file, and no recipe of that name "
            f"({', '.join(recipe_names())})"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a map of sections, got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return _validated(Recipe, values, str(path))


def codec_config(overrides: list[str]) -> CodecConfig:
    """How a codec is trained: the defaults, with `key=value` overrides laid over them.

    Raises:
        RecipeError: an unknown key or a bad value; always one line.
    """
    # Here and not above: a recipe can be read and refused without torch.
    from training.codec.config import CodecConfig

    values: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
    return _validated(CodecConfig, values, "train-codec")


def save_recipe(recipe: Recipe, folder: str | Path, *, bucket_as_given: bool = False) -> None:
    """Write the resolved recipe, defaults and all, beside what it makes, as `recipe.yaml`.

    Args:
        bucket_as_given: leave out the keys of `prepare.bucket` that nobody gave. For whoever did
            not prepare with this recipe: written down, a default would state what the data are.
    """
    values = recipe.model_dump(mode="json")
    if bucket_as_given:
        bucket = recipe.prepare.bucket
        values["prepare"]["bucket"] = bucket.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(values, sort_keys=False)
    open_folder(folder).write("recipe.yaml", text.encode())


def _validated(schema: type[Schema], values: dict[str, Any], where: str) -> Schema:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_one_line(error, schema)}") from error


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {text!r}: write key.path=value, such as train.steps=100")
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise RecipeError(f"override {text!r}: {part!r} is a value, not a section")
    section[parts[-1]] = yaml.safe_load(raw)


def _one_line(error: ValidationError, schema: type[BaseModel]) -> str:
    """Key, value and rule of the first mistake, and how many more there are."""
    first, *rest = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = _fields_at(schema, first["loc"][:-1])
        hint = _nearest(schema, first["loc"], allowed)
        text = f"{key} = {first['input']!r}: unknown key; {hint}allowed here: {', '.join(allowed)}"
    elif first["type"] in ("missing", "missing_argument"):
        text = f"{key}: missing; this key must be given"
    else:
        value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
        text = f"{key}{value}: {first['msg']}"
    more = f" (and {len(rest)} more)" if rest else ""
    return " ".join(text.split()) + more


def _nearest(schema: type[BaseModel], location: tuple[Any, ...], allowed: list[str]) -> str:
    """A question after the key that may be meant; it may belong in a section inside this one."""
    *section, name = (str(part) for part in location)
    for inner in allowed:
        if name in _fields_at(schema, (*section, inner)):
            return f"did you mean {'.'.join([*section, inner, name])}? "
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that the schema allows in a section; none where it is no section."""
    schema = model.model_json_schema()
    node = schema
    for part in location:
        node = node.get("properties", {}).get(str(part), {})
        reference = node.get("$ref") or next(
            (option["$ref"] for option in node.get("anyOf", []) if "$ref" in option), None
        )
        if reference:
            node = schema["$defs"][reference.rsplit("/", 1)[-1]]
    return list(node.get("properties", {}))
