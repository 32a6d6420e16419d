"""Whether motion is plausible: momentum at a bounce, and a thing that passes behind a bar.

Both are read from the judge's track of the thing, with no word of the prompt. Real clips are read
the same way: their figures are what a perfect model would have. Knows nothing of models, pixels or
files.

Shapes: T frames; places are (down, right) in lengths of the picture's smaller side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

MIN_SPEED = 0.05
"""Lengths per second below which a thing does not move."""
HIDDEN_SHARE, SHOWN_SHARE, WHOLE_SHARE = 0.25, 0.6, 0.93
"""Of a thing's largest area: below the first it is hidden, above the second it is shown, above the
third it is shown whole, so that its middle is where its pixels say."""

Floats = npt.NDArray[np.floating]


class Tracked(Protocol):
    """The way of a video's thing; None where there is no thing."""

    @property
    def world_T2(self) -> Floats | None:
        """Its place in each frame, whatever the camera does; nan where it cannot be told."""

    @property
    def area_T(self) -> Floats | None:
        """How much of it is seen in each frame."""


@dataclass(frozen=True)
class Bounces:
    """Of clips in which one thing bounces off the edges.

    Attributes:
        turned: share of the clips in which the thing turns round along an axis.
        momentum_ratio: median over those of momentum after the turn over momentum before: 1 is
            elastic.
        clips: how many were read.
    """

    turned: float
    momentum_ratio: float
    clips: int


@dataclass(frozen=True)
class Permanence:
    """Of clips in which one thing passes behind a bar.

    Attributes:
        hidden: share of the clips in which it is seen, and then hidden.
        came_out: share of those in which it is seen again.
        place_error: median distance of where it comes out from where it would be had it gone on as
            before, lengths.
        clips: how many were read.
    """

    hidden: float
    came_out: float
    place_error: float
    clips: int


@dataclass(frozen=True)
class Physics:
    """Figures of the world's mechanics, of one set of clips; None where the world lacks them."""

    bounce: Bounces | None
    occluder: Permanence | None


def bounces(tracks: Sequence[Tracked], fps: float) -> Bounces:
    """In each clip take the turn along an axis that is clearest, and compare momenta."""
    ratios = [None if t.world_T2 is None else momentum_ratio(t.world_T2, fps) for t in tracks]
    found = [ratio for ratio in ratios if ratio is not None]
    return Bounces(
        turned=len(found) / len(ratios),
        momentum_ratio=float(np.median(found)) if found else float("nan"),
        clips=len(ratios),
    )


def momentum_ratio(places_T2: Floats, fps: float) -> float | None:
    """Speed after the clearest turn over speed before it; None where it does not turn.

    The turn is where medians before and after are most opposed: a median forgives the frame in
    which the thing touches the edge.
    """
    velocity_T2 = np.diff(places_T2[np.isfinite(places_T2[:, 0])], axis=0) * fps
    best, ratio = MIN_SPEED**2, None
    for moment in range(2, len(velocity_T2) - 1):
        before_2 = np.median(velocity_T2[:moment], axis=0)
        after_2 = np.median(velocity_T2[moment:], axis=0)
        for before, after in zip(before_2, after_2, strict=True):
            if -before * after > best and min(abs(before), abs(after)) > MIN_SPEED:
                best, ratio = -before * after, float(abs(after) / abs(before))
    return ratio


def permanence(tracks: Sequence[Tracked]) -> Permanence:
    """In each clip look for a thing that is shown, then hidden, then shown again."""
    read = [passage(t) for t in tracks]
    hidden = [found for found in read if found is not None]
    errors = [error for came_out, error in hidden if came_out and np.isfinite(error)]
    return Permanence(
        hidden=len(hidden) / len(read),
        came_out=sum(came_out for came_out, _ in hidden) / len(hidden) if hidden else float("nan"),
        place_error=float(np.median(errors)) if errors else float("nan"),
        clips=len(read),
    )


def passage(track: Tracked) -> tuple[bool, float] | None:
    """Whether a thing that was hidden comes out, and how far from its straight way (or nan).

    None where it never was shown and then hidden.
    """
    area_T, places_T2 = track.area_T, track.world_T2
    if area_T is None or places_T2 is None:
        return None
    largest, times = area_T.max(), np.arange(len(area_T))
    shown = times[area_T > SHOWN_SHARE * largest]
    hidden = times[area_T < HIDDEN_SHARE * largest]
    if largest == 0 or not len(shown) or not (hidden > shown[0]).any():
        return None
    gone = hidden[hidden > shown[0]][0]
    whole = times[(area_T > WHOLE_SHARE * largest) & np.isfinite(places_T2[:, 0])]
    before, after = whole[whole < gone], whole[whole > gone]
    came_out = bool((shown > gone).any())
    # Two places tell a velocity.
    if len(before) < 2 or not len(after):
        return came_out, float("nan")
    slope_2, start_2 = np.polyfit(before, places_T2[before], 1)
    expected_T2 = start_2 + slope_2 * after[:, None]
    return came_out, float(np.median(np.hypot(*(places_T2[after] - expected_T2).T)))
