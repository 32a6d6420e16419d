"""The scene that a seed draws.

A scene can be read by who sees it:

- Things keep in the picture: an outline leaves it by less than a third of its breadth.
- The camera moves only over a background that shows it (striped, cloudy), over a single thing
  whose motion can be told from the camera's own (`CAMERA_MOTIONS`). What is said of a thing's
  motion is relative to the world. Under a pan a thing that moves does so quickly, so that its way
  in the picture stays nearer to its own direction than to any other. Under a zoom a thing is not
  large; its size is that in the middle of the clip.
- Two things have colours and shapes of their own. They go along lanes, or meet head-on.

Knows nothing of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from data_prep.world.scene import CLIP_S, MOST_S, Occluder, Scene, SceneKinds, Thing
from data_prep.world.split import Split, in_split
from data_prep.world.vocabulary import (
    CAMERA_MOTIONS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SHOWING_TEXTURES,
    SIZE_JITTER,
    SIZES,
    SPEEDS,
    TEXTURES,
    TONES,
    WorldError,
    check_words,
)

_WORDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": MOTIONS,
    "speed": SPEEDS,
    "tone": tuple(TONES),
    "texture": TEXTURES,
    "camera": CAMERAS,
}
_LANES: tuple[tuple[str, ...], ...] = (("up", "down", "still"), ("left", "right", "still"))
"""What two things may do side by side: motions along axis 0 or axis 1."""
_PAN_RATES = (0.07, 0.095)
"""Lengths per second."""
_ZOOM_RATES = (0.10, 0.15)
"""Logarithm of the scale per second."""
_CAMERA_MOVES = 0.5
"""Share of the scenes with a moving camera, of those in which it can move."""


def random_scene(
    seed: int, *, kinds: SceneKinds | None = None, split: Split = "seen", **fixed: str
) -> Scene:
    """The scene of a seed.

    It is the same on every machine: the generator draws integers, and floats are exact fractions
    of them.

    Args:
        seed: any whole number from 0.
        kinds: which scenes are drawn; by default all.
        split: combinations of colour, shape and motion that things may have; training data has the
            seen ones only.
        fixed: words for the (first) thing's colour, shape, size, motion, speed, for tone, texture
            and camera. They may go beyond `kinds`.

    Raises:
        WorldError: an unknown word, or words that no scene of the split has together.

    >>> random_scene(3, colour="red").thing.colour
    'red'
    """
    for name, word in fixed.items():
        if name not in _WORDS:
            raise WorldError(f"unknown attribute {name!r}: allowed are {', '.join(_WORDS)}")
        check_words(name, (word,), _WORDS[name])
    draw = _Draw(np.random.default_rng([seed, 2511]), kinds or SceneKinds(), split, fixed)
    share = draw.rng.random()
    drawn = None
    if share < draw.kinds.two_things:
        drawn = draw.two_things()
    elif share < draw.kinds.two_things + draw.kinds.occluders:
        drawn = draw.behind_bar()
    # Fixed words can exclude the rarer kinds.
    scene = drawn or draw.one_thing()
    return replace(scene, seed=seed)


@dataclass(frozen=True)
class _Draw:
    """The drawing of one scene."""

    rng: np.random.Generator
    kinds: SceneKinds
    split: Split
    fixed: Mapping[str, str]

    def word(self, name: str, among: tuple[str, ...] | None = None) -> str:
        """The fixed word, or one drawn from those."""
        options = among or _WORDS[name]
        drawn = options[int(self.rng.integers(len(options)))]
        return self.fixed.get(name, drawn)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def sign(self) -> int:
        return 1 if self.rng.random() < 0.5 else -1

    def one_thing(self) -> Scene:
        """One thing, and a camera that may move."""
        camera = self.fixed.get("camera")
        motions = self.kinds.motions
        if camera is not None:
            motions = tuple(m for m in motions if m in CAMERA_MOTIONS[camera])
            motions = motions or CAMERA_MOTIONS[camera]
        colour, shape, motion = self.combination(motions)
        if camera is None:
            camera = self.camera_for(motion)
        elif motion not in CAMERA_MOTIONS[camera]:
            raise WorldError(
                f"motion {motion!r} under camera {camera!r}: it cannot be told from the camera's "
                f"own, give one of {', '.join(CAMERA_MOTIONS[camera])}"
            )
        speeds = ("quickly",) if "pan" in camera else SPEEDS
        sizes = ("small", "medium") if "zoom" in camera else tuple(SIZES)
        size, radius = self.size(tuple(s for s in sizes if s in self.kinds.sizes) or sizes)
        speed = "" if motion == "still" else self.word("speed", speeds)
        thing = Thing(colour, shape, size, motion, speed, radius, (0.0, 0.0), (0.0, 0.0))
        return self.scene((self.placed(thing, camera),), camera)

    def two_things(self) -> Scene | None:
        """Two small or medium things on lanes, or two small ones that meet; None if none fit."""
        motions = self.kinds.motions
        lanes = [tuple(m for m in lane if m in motions) for lane in _LANES]
        choices = [lane for lane in lanes if len(lane) > 1 and self.allows("motion", lane)]
        if "bounce" in motions and self.allows("motion", ("bounce",)):
            choices.append(("bounce",))
        if not choices or not self.allows("camera", ("static",)):
            return None
        # One of them at least is a direction, since `still` is the only other.
        chosen = choices[int(self.rng.integers(len(choices)))]
        meeting = chosen == ("bounce",)
        sizes = ("small",) if meeting else ("small", "medium")
        if not self.allows("size", sizes):
            return None
        colour, shape, motion = self.combination(chosen)
        other = self.another(colour, shape, motion, chosen)
        things = []
        for number, words in enumerate(((colour, shape, motion), other)):
            size, radius = self.size(sizes, fixed=number == 0)
            speed = "" if words[2] == "still" else SPEEDS[int(self.rng.integers(2))]
            things.append(Thing(words[0], words[1], size, words[2], speed, radius, (0, 0), (0, 0)))
        if meeting:
            return replace(self.scene(self.colliding(things), "static"), meeting=True)
        axis = 0 if "up" in chosen or "down" in chosen else 1
        return self.scene(self.on_lanes(things, axis), "static")

    def behind_bar(self) -> Scene | None:
        """A small thing that passes behind a bar; None if no such thing is wanted."""
        motions = tuple(m for m in ("left", "right", "up", "down") if m in self.kinds.motions)
        fits = self.allows("size", ("small",)) and self.allows("speed", ("quickly",))
        fits = fits and self.allows("camera", ("static",))
        if not motions or not self.allows("motion", motions) or not fits:
            return None
        colour, shape, motion = self.combination(motions)
        size, radius = self.size(("small",))
        way = DIRECTIONS[motion]
        axis = 0 if way[0] else 1
        rate, aside = self.between(0.37, 0.41), self.between(-0.15, 0.15)
        centre = [aside, aside]
        centre[axis] = self.between(-0.02, 0.02)
        velocity = (way[0] * rate, way[1] * rate)
        thing = Thing(
            colour, shape, size, motion, "quickly", radius, (centre[0], centre[1]), velocity
        )
        # Wide enough to hide the thing wholly, so that it has to be remembered.
        bar = Occluder(axis, self.between(-0.03, 0.03), thing.extent[axis] + 0.05)
        return replace(self.scene((thing,), "static"), occluder=bar)

    def allows(self, name: str, among: tuple[str, ...]) -> bool:
        """Whether the fixed word, if there is one, is among these."""
        return self.fixed.get(name, among[0]) in among

    def combination(self, motions: tuple[str, ...]) -> tuple[str, str, str]:
        """Colour, shape and motion that belong to the split."""
        for _ in range(1000):
            words = (self.word("colour"), self.word("shape"), self.word("motion", motions))
            if in_split(*words, self.split):
                return words
        raise WorldError(
            f"no {self.split} combination has {dict(self.fixed)}: fix fewer words, or take "
            "split 'any'"
        )

    def another(
        self, colour: str, shape: str, motion: str, motions: tuple[str, ...]
    ) -> tuple[str, str, str]:
        """Words of a second thing that can be told from the first."""
        free = _Draw(self.rng, self.kinds, self.split, {})
        while True:
            words = free.combination(motions)
            # Two things that both stand still would be a picture.
            moves = words[2] != "still" or motion != "still"
            if words[0] != colour and words[1] != shape and moves:
                return words

    def size(self, among: tuple[str, ...], *, fixed: bool = True) -> tuple[str, float]:
        """A size and a radius of it."""
        size = self.word("size", among) if fixed else among[int(self.rng.integers(len(among)))]
        return size, SIZES[size] * self.between(1 - SIZE_JITTER, 1 + SIZE_JITTER)

    def camera_for(self, motion: str) -> str:
        """A camera under which this motion can be read."""
        showing = (self.fixed["texture"],) if "texture" in self.fixed else self.kinds.textures
        moving = [c for c in self.kinds.cameras if c != "static" and motion in CAMERA_MOTIONS[c]]
        if self.fixed.get("speed") == "slowly":
            moving = [c for c in moving if "pan" not in c]
        if self.fixed.get("size") == "large":
            moving = [c for c in moving if "zoom" not in c]
        shown = any(texture in SHOWING_TEXTURES for texture in showing)
        share, drawn = self.rng.random(), int(self.rng.integers(max(1, len(moving))))
        if not moving or not shown:
            return "static"
        # Where `kinds` has no static camera it is still the one that every motion can have.
        moves = share < _CAMERA_MOVES or "static" not in self.kinds.cameras
        return moving[drawn] if moves else "static"

    def scene(self, things: tuple[Thing, ...], camera: str) -> Scene:
        """A scene around its things."""
        textures = self.kinds.textures
        rate = 0.0
        if camera != "static":
            textures = tuple(t for t in textures if t in SHOWING_TEXTURES) or SHOWING_TEXTURES
            rate = self.between(*(_PAN_RATES if "pan" in camera else _ZOOM_RATES))
        texture = self.word("texture", textures)
        if camera != "static" and texture not in SHOWING_TEXTURES:
            raise WorldError(
                f"camera {camera!r} over a {texture} background cannot be seen: give one of "
                f"{', '.join(SHOWING_TEXTURES)}"
            )
        return Scene(things, self.word("tone"), texture, camera, rate, None, False, 0)

    def placed(self, thing: Thing, camera: str = "static") -> Thing:
        """A single thing with place and velocity for its motion."""
        quick = thing.speed == "quickly"
        # What the camera does to a place leaves less room for the thing's own way.
        nearer = math.exp(_ZOOM_RATES[1] * MOST_S / 2) if "zoom" in camera else 1.0
        aside = _PAN_RATES[1] * MOST_S / 2 if "pan" in camera else 0.0
        room = 0.5 / nearer - np.array(thing.extent) - np.array([0.0, aside])
        if thing.motion == "bounce":
            return self.bouncing(thing, room, 2.6 if quick else 1.3)
        if thing.motion == "circle":
            # A turn of the clip's length or a half: the way is seen as round either way.
            turn = self.sign() * 2 * math.pi / self.between(*((1.1, 1.25) if quick else (2.1, 2.4)))
            orbit = min(0.22, max(0.16, float(room.min()))) * self.between(0.92, 1.0)
            return self.circling(thing, turn, orbit)
        way = np.array(DIRECTIONS.get(thing.motion, (0, 0)), dtype=np.float64)
        way /= max(1.0, math.hypot(*way))
        rate = 0.0
        if thing.speed:
            rate = self.between(0.27, 0.31) if quick else self.between(0.14, 0.165)
        travel = np.abs(way) * rate * MOST_S / 2
        # Along its way an outline may leave by a fifth of its breadth, else not at all.
        leave = np.where(way != 0, 0.4 * np.array(thing.extent), 0.0)
        spread = np.clip(room + leave - travel, 0.0, 0.2)
        centre = (self.between(-spread[0], spread[0]), self.between(-spread[1], spread[1]))
        return replace(thing, centre=centre, velocity=(way[0] * rate, way[1] * rate))

    def bouncing(self, thing: Thing, room: np.ndarray, rooms: float) -> Thing:
        """Between two opposite edges, a little aslant; an edge is met well within the clip."""
        axis = int(self.rng.integers(2))
        rate = rooms * float(room[axis]) * 2 / CLIP_S * self.between(0.95, 1.05)
        centre, velocity = [0.0, 0.0], [0.0, 0.0]
        # In the middle of the clip it is a quarter of the room from an edge, or nearer.
        centre[axis] = self.sign() * self.between(0.5, 0.85) * float(room[axis])
        velocity[axis] = self.sign() * rate
        aside = 1 - axis
        slant = self.sign() * self.between(0.03, 0.10)
        centre[aside] = self.between(-0.5, 0.5) * max(0.0, float(room[aside]) - 0.1)
        velocity[aside] = slant
        return replace(thing, centre=(centre[0], centre[1]), velocity=(velocity[0], velocity[1]))

    def circling(self, thing: Thing, turn: float, orbit: float) -> Thing:
        """On a circle around about the middle of the picture."""
        angle = self.between(0, 2 * math.pi)
        spread = max(0.0, 0.5 - max(thing.extent) - orbit)
        middle = (self.between(-spread, spread), self.between(-spread, spread))
        outward = (math.sin(angle), math.cos(angle))
        centre = (middle[0] + orbit * outward[0], middle[1] + orbit * outward[1])
        rate = orbit * turn
        return replace(
            thing, centre=centre, velocity=(rate * outward[1], -rate * outward[0]), turn=turn
        )

    def on_lanes(self, things: list[Thing], axis: int) -> tuple[Thing, ...]:
        """Two things that go side by side along an axis and never touch."""
        side = self.sign()
        placed = []
        for thing, lane in zip(things, (-side, side), strict=True):
            alone = self.placed(thing)
            aside = 1 - axis
            centre = list(alone.centre)
            centre[aside] = lane * (0.25 + self.between(-0.01, 0.01))
            placed.append(replace(alone, centre=(centre[0], centre[1])))
        return tuple(placed)

    def colliding(self, things: list[Thing]) -> tuple[Thing, ...]:
        """Two things that come from opposite sides along one line and meet near the middle."""
        axis, aside, side = int(self.rng.integers(2)), self.between(-0.2, 0.2), self.sign()
        extents = [thing.extent[axis] for thing in things]
        # So fast that they come from the edges, and after the exchange leave by as little.
        most = (0.5 - 1.5 * max(extents)) / (MOST_S / 2)
        touch = self.between(-0.02, 0.02)
        placed = []
        for thing, way, extent in zip(things, (side, -side), extents, strict=True):
            rate = self.between(0.7, 1.0) * most
            centre, velocity = [aside, aside], [0.0, 0.0]
            centre[axis], velocity[axis] = touch - way * extent, way * rate
            speed = "quickly" if rate > 0.22 else "slowly"
            placed.append(
                replace(
                    thing,
                    speed=speed,
                    centre=(centre[0], centre[1]),
                    velocity=(velocity[0], velocity[1]),
                )
            )
        return tuple(placed)
