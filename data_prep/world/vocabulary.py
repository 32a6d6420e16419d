"""The words of the synthetic world and what each of them means in numbers.

Every length is a fraction of the picture's smaller side. Knows nothing of pixels.
"""

from __future__ import annotations

from flowreel.errors import FlowreelError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 34, 46),
    "orange": (240, 128, 40),
    "yellow": (234, 226, 44),
    "green": (38, 198, 46),
    "cyan": (40, 206, 212),
    "blue": (42, 84, 226),
    "purple": (136, 44, 226),
    "pink": (244, 70, 198),
}
"""RGB, 0..255. As far apart in hue as the names allow (29° at least), all about as saturated."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")

EXTENTS: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (0.886, 0.886),
    "triangle": (1.039, 1.2),
    "cross": (1.08, 1.08),
    "ring": (1.06, 1.06),
}
"""Half height and half width of each shape, in radii: all cover about as much of the picture."""

SIZES: dict[str, float] = {"small": 0.125, "medium": 0.18, "large": 0.25}
"""Radius; each scene's own is at most `SIZE_JITTER` of it away, so that sizes stay far apart."""
SIZE_JITTER = 0.06

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
    "up-left": (-1, -1),
    "up-right": (-1, 1),
    "down-left": (1, -1),
    "down-right": (1, 1),
}
"""The straight motions, as (down, right)."""
MOTIONS = (*DIRECTIONS, "circle", "bounce", "still")
SPEEDS = ("slowly", "quickly")

TONES: dict[str, float] = {"dark": 0.18, "grey": 0.45, "light": 0.75}
"""Mean brightness of the background, 0..1."""
TEXTURES = ("smooth", "shaded", "striped", "cloudy")
"""Shaded: a gradient. Cloudy: noise with the spectrum of natural pictures, long waves only."""
SHOWING_TEXTURES = ("striped", "cloudy")
"""Those on which a move of the camera can be seen."""

CAMERAS = ("static", "pan left", "pan right", "zoom in", "zoom out")
CAMERA_MOTIONS: dict[str, tuple[str, ...]] = {
    "static": MOTIONS,
    "pan left": ("still", "up", "down"),
    "pan right": ("still", "up", "down"),
    "zoom in": ("still", "left", "right", "up", "down"),
    "zoom out": ("still", "left", "right", "up", "down"),
}
"""Motions that can be told apart from each camera's own: across a pan, straight under a zoom."""


class WorldError(FlowreelError, ValueError):
    """A scene that the world does not have: an unknown word, or words that exclude each other."""


def check_words(kind: str, words: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Refuse words that the world does not know.

    >>> check_words("colour", ("brown",), ("red", "blue"))
    Traceback (most recent call last):
    ...
    data_prep.world.vocabulary.WorldError: unknown colour 'brown': allowed are red, blue

    Raises:
        WorldError: no word, or one that is not among the allowed ones.
    """
    if not words:
        raise WorldError(f"no {kind} given: give one of {', '.join(allowed)} at least")
    for word in words:
        if word not in allowed:
            raise WorldError(f"unknown {kind} {word!r}: allowed are {', '.join(allowed)}")
