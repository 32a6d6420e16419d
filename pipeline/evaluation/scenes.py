"""The world's side of a measurement: what is asked for, real clips of it, and who reads them.

Knows the synthetic world. Knows nothing of models.

Shapes: N clips, T video frames, H, W pixels; frames uint8 [N, T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_prep.world.captions import canonical, canonical_image
from data_prep.world.draw import random_scene
from data_prep.world.prompts import Prompt, prompts
from data_prep.world.render import render_clip
from data_prep.world.scene import Scene, SceneKinds
from data_prep.world.split import Split
from media.frames import Frames
from serving.requests import ModelFacts

HELD_OUT_SEED = 910_000_000
"""Scenes from here on are trained on by nobody: a world's own seeds begin at 0, a codec's held-out
ones at 900 million."""
FIT_SEED = 930_000_000
STAYING = ("still", "circle", "bounce")
"""Motions that keep a thing in the picture for as long as one likes."""


@dataclass(frozen=True)
class Asked:
    """Prompts, and a real clip of each.

    Attributes:
        prompts: word by word.
        texts: the sentences.
        real_NTHWC: rendered clips of the model's length and size.
    """

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    real_NTHWC: Frames


def asked(count: int, split: Split, seed: int, kinds: SceneKinds, facts: ModelFacts) -> Asked:
    """Prompts of one thing each, evenly over words, and a clip of each."""
    chosen = tuple(prompts(count, split=split, seed=seed, kinds=kinds))
    shown = [prompt.scene for prompt in chosen]
    return Asked(chosen, tuple(captions(shown, facts)), rendered(shown, facts))


def held_out_scenes(count: int, seed: int, kinds: SceneKinds, *, first: int) -> list[Scene]:
    """Scenes of seen combinations, drawn from seeds that no training uses."""
    start = first + seed * 100_003
    return [random_scene(start + number, kinds=kinds) for number in range(count)]


def staying(count: int, seed: int, kinds: SceneKinds) -> list[Scene]:
    """Held-out scenes of one thing that keeps in the picture, whatever the kinds say of motion."""
    alone = replace(kinds, motions=STAYING, cameras=("static",), two_things=0, occluders=0)
    return held_out_scenes(count, seed, alone, first=HELD_OUT_SEED)


def rendered(
    scenes: Sequence[Scene], facts: ModelFacts, *, num_frames: int | None = None
) -> Frames:
    """A clip of each scene at a model's size and frame rate, of its trained length by default."""
    length = facts.num_frames if num_frames is None else num_frames
    clips = [render_clip(s, length, facts.fps, facts.height, facts.width) for s in scenes]
    return np.stack(clips)


def captions(scenes: Sequence[Scene], facts: ModelFacts) -> list[str]:
    """What is said of each, in the wording of prompts; for an image model without motion."""
    say = canonical if facts.num_frames > 1 else canonical_image
    return [say(scene) for scene in scenes]


def one_motion(
    motion: str, count: int, seed: int, kinds: SceneKinds, facts: ModelFacts
) -> tuple[list[str], Frames]:
    """Prompts for things that all move one way, and a clip of each."""
    alone = replace(kinds, motions=(motion,), cameras=("static",), two_things=0, occluders=0)
    of_motion = asked(count, "seen", seed, alone, facts)
    return [*of_motion.texts], of_motion.real_NTHWC


def behind_bars(
    count: int, seed: int, kinds: SceneKinds, facts: ModelFacts
) -> tuple[list[str], Frames]:
    """Prompts for things that pass behind a grey bar, and a clip of each."""
    hidden = replace(kinds, two_things=0, occluders=1)
    scenes = held_out_scenes(count, seed, hidden, first=HELD_OUT_SEED)
    return captions(scenes, facts), rendered(scenes, facts)
