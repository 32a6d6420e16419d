"""A scene of the synthetic world, and which kinds of scenes there are.

Lengths are fractions of the picture's smaller side, places are (down, right) from its middle, times
are seconds from the middle of the clip. So a scene is the same at any size and frame rate; it is
made to be watched for about `CLIP_S` seconds. `data_prep.world.draw` draws one. Knows nothing of
pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from data_prep.world.split import is_seen
from data_prep.world.vocabulary import (
    CAMERAS,
    DIRECTIONS,
    EXTENTS,
    MOTIONS,
    SIZES,
    TEXTURES,
    WorldError,
    check_words,
)

CLIP_S = 2.0
"""Seconds that a scene is made for: 33 frames at 16 fps, or 17 at 8."""
MOST_S = 2.1
"""Seconds over which things keep in the picture: clips are written a few frames longer."""


@dataclass(frozen=True)
class Thing:
    """One coloured shape and how it moves."""

    colour: str
    shape: str
    size: str
    motion: str
    speed: str
    """slowly or quickly; empty for what is still."""
    radius: float
    centre: tuple[float, float]
    """At time 0."""
    velocity: tuple[float, float]
    """Lengths per second at time 0."""
    turn: float = 0.0
    """Radians per second by which the velocity turns; above 0 clockwise."""

    @property
    def extent(self) -> tuple[float, float]:
        """Half height and half width of the outline, in lengths."""
        down, right = EXTENTS[self.shape]
        return self.radius * down, self.radius * right

    @property
    def is_seen(self) -> bool:
        """Whether its combination of colour, shape and motion may stand in training data."""
        return is_seen(self.colour, self.shape, self.motion)


@dataclass(frozen=True)
class Occluder:
    """A grey bar across the whole picture, in front of the things."""

    axis: int
    """0: it lies across a thing that moves up or down; 1: across one that moves left or right."""
    centre: float
    half_width: float


@dataclass(frozen=True)
class Scene:
    """One scene; `things` holds one or two, or none for the background alone.

    >>> from data_prep.world.draw import random_scene
    >>> random_scene(3, colour="red", motion="left", kinds=EASY).thing.motion
    'left'
    """

    things: tuple[Thing, ...]
    tone: str
    texture: str
    camera: str
    camera_rate: float
    """Lengths per second of a pan, logarithm of the scale per second of a zoom; 0 if static."""
    occluder: Occluder | None
    meeting: bool
    """Two things that collide; centre and velocity are those from before, had they gone on."""
    seed: int
    """What of the background is not in words is drawn from it."""

    @property
    def thing(self) -> Thing:
        """The first thing, or the only one."""
        return self.things[0]


@dataclass(frozen=True)
class SceneKinds:
    """Which scenes are drawn; by default all there are.

    Attributes:
        motions: how things may move; two move left, right, up, down, not at all, or bounce.
        cameras: what the camera may do; one that moves also needs a texture that shows it.
        textures: what the background may be like.
        sizes: of a thing that is alone; two things and those behind a bar have their own.
        two_things: share of the scenes with two things, 0 to 1.
        occluders: share of the scenes in which a thing passes behind a bar, 0 to 1.

    Raises:
        WorldError: a word that the world does not have, or a share outside 0 to 1.
    """

    motions: tuple[str, ...] = MOTIONS
    cameras: tuple[str, ...] = CAMERAS
    textures: tuple[str, ...] = TEXTURES
    sizes: tuple[str, ...] = tuple(SIZES)
    two_things: float = 0.2
    occluders: float = 0.05

    def __post_init__(self) -> None:
        check_words("motion", self.motions, MOTIONS)
        check_words("camera", self.cameras, CAMERAS)
        check_words("texture", self.textures, TEXTURES)
        check_words("size", self.sizes, tuple(SIZES))
        for name in ("two_things", "occluders"):
            if not 0 <= getattr(self, name) <= 1:
                raise WorldError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")


EASY = SceneKinds((*DIRECTIONS, "still"), ("static",), TEXTURES, two_things=0, occluders=0)
"""One thing that moves straight or not at all, seen by a camera that stands still."""


def scene_from(record: Mapping[str, Any]) -> Scene:
    """A scene from what `asdict` made of it, also after it was JSON.

    >>> from dataclasses import asdict
    >>> from data_prep.world.draw import random_scene
    >>> scene_from(asdict(random_scene(7))) == random_scene(7)
    True
    """
    things = tuple(
        Thing(**{**thing, "centre": tuple(thing["centre"]), "velocity": tuple(thing["velocity"])})
        for thing in record["things"]
    )
    bar = record["occluder"]
    return Scene(**{**record, "things": things, "occluder": Occluder(**bar) if bar else None})


def is_scene(record: object) -> bool:
    """Whether `scene_from` takes it: it names everything of a scene."""
    return (
        isinstance(record, Mapping)
        and {field.name for field in fields(Scene)} == record.keys()
        and isinstance(record["things"], list | tuple)
    )
