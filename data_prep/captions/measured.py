"""Captions from pixels, without weights: what the synthetic world's judge reads, as a sentence.

Made for the synthetic world, and for what a model that was trained on it generates. Of real footage
it says little that is true, so it is asked of none unless `captioner.any_video` is set. Needs numpy
and Pillow only. Knows nothing of Ray or files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.captions.captioner import CaptionResult
from data_prep.world.captions import CAMERA_MOVES, deed
from data_prep.world.judge import Reading, judge_things, reduced
from media.frames import Frames

_FLOOD = 0.25
"""Share of the picture from which a colour without a shape is the look of the whole."""


class MeasuredCaptioner:
    """The captioner without weights.

    >>> MeasuredCaptioner(fps=8.0).caption(np.full((5, 32, 32, 3), 20, dtype=np.uint8))
    'A mostly dark scene without motion.'
    """

    name = "measured"

    def __init__(self, fps: float) -> None:
        """Make one for clips of so many frames per second."""
        self.fps = fps

    def caption(self, frames: Frames) -> str:
        """One sentence about uint8 frames [T, H, W, 3]; the same frames give the same one.

        It is the canonical wording (`data_prep.world.captions`) without the texture. A word of
        which the judge is not sure is left out; without colour or shape there is no thing to tell
        of.
        """
        readings = judge_things(frames, fps=self.fps)
        things = [reading for reading in readings if reading.colour and reading.shape]
        if things:
            return _of_things(things)
        look = _look(readings[0], frames)
        if len(frames) == 1:
            return f"A mostly {look} picture."
        activity = _activity(reduced(frames))
        if activity < 0.5:
            return f"A mostly {look} scene without motion."
        return f"A mostly {look} scene with {'slow' if activity < 8 else 'fast'} motion."

    def caption_all(self, clips: Sequence[Frames]) -> list[CaptionResult]:
        """A sentence for every clip."""
        return [CaptionResult(self.caption(frames)) for frames in clips]

    def close(self) -> None:
        """Do nothing: it holds nothing."""


def _of_things(things: Sequence[Reading]) -> str:
    """A sentence about one thing or two."""
    clause = " and ".join(_clause(thing) for thing in things)
    camera = CAMERA_MOVES.get(things[0].camera or "", "")
    moves = f"; the camera {camera}" if camera else ""
    return f"{clause[0].upper()}{clause[1:]} over a {things[0].tone} background{moves}."


def _clause(thing: Reading) -> str:
    """Subject and verb of a thing, as far as they are read."""
    does = None if thing.motion is None else deed(thing.motion, thing.speed or "")
    words = ("a", thing.size, thing.colour, thing.shape, does)
    return " ".join(word for word in words if word)


def _look(reading: Reading, frames: Frames) -> str:
    """The colour that floods the picture, or its tone."""
    height, width = frames.shape[1:3]
    # A picture's area in squares of its smaller side, as radii are.
    floods = np.pi * reading.radius**2 > _FLOOD * max(height, width) / min(height, width)
    return reading.colour if reading.colour and floods else reading.tone or "grey"


def _activity(frames: Frames) -> float:
    """Mean change between neighbouring frames, 0..255."""
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())
