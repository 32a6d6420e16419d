"""What an evaluation found: one flat list of named figures, and its files.

    evaluation.json   every figure by its name, and how it was measured
    evaluation.md     the same as tables
    evaluation.html   the same with videos, real beside generated (`page.py`)

Names are `family.figure`; those of prompt following are `seen.colour`, `unseen.colour` and so on,
and those of the likelihood stand alone, as in the demo's summary. MLflow gets the same names.
Measures nothing. Knows nothing of Ray or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flowreel.values import flattened
from media.frames import Frames
from pipeline.evaluation.codec_quality import CodecQuality
from pipeline.evaluation.distances import Distance
from pipeline.evaluation.drift import Drift
from pipeline.evaluation.fidelity import Fidelity
from pipeline.evaluation.nats import Nats
from pipeline.evaluation.physics import Physics
from pipeline.evaluation.prompt_following import PromptFollowing, Share
from pipeline.evaluation.steadiness import Steadiness

FORMAT = "flowreel evaluation 1"


@dataclass(frozen=True)
class About:
    """What was measured, and how.

    Attributes:
        model: its folder.
        size: of its videos, such as "17 frames of 64x64 at 8 fps".
        parameters: of flow and denoiser.
        codec_digest: of the codec it was trained with.
        data: dataset of the held-out clips; None where they were rendered.
        prompts: prompts of seen combinations, and as many of unseen ones.
        guidance, schedule, denoiser, seed: how videos were made.
        seconds: that each family took.
    """

    model: str
    size: str
    parameters: int
    codec_digest: str
    data: str | None
    prompts: int
    guidance: float
    schedule: str
    denoiser: str
    seed: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class ShownClip:
    """A prompt's video beside a real clip of it, before and after the codec; uint8 [T, H, W, 3].

    `split` says whether its combination of words was trained on: seen or unseen. `read` has what
    the judge reads from the model's video, word by word, and whether it is what was asked for.
    """

    prompt: str
    split: str
    made: Frames
    real: Frames
    back: Frames | None
    read: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class Shown:
    """The videos that a page shows."""

    clips: tuple[ShownClip, ...] = ()
    long_video: Frames | None = None
    fps: float = 8.0


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found; a family that was not asked for is None.

    Attributes:
        about: how it was measured.
        nats: likelihood.
        prompts: prompt following.
        sampler: fidelity of the sampler.
        codec: the codec's round trip, of clips of the trained length and of long ones.
        distances: by what the vectors are.
        steadiness: flicker and flow-warp error, by whose clips: generated, codec, real.
        physics: figures of the world's mechanics, by whose clips: generated, real.
        drift: of one long video.
    """

    about: About
    nats: Nats | None = None
    prompts: PromptFollowing | None = None
    sampler: Fidelity | None = None
    codec: dict[str, CodecQuality] | None = None
    distances: dict[str, Distance] | None = None
    steadiness: dict[str, Steadiness] | None = None
    physics: dict[str, Physics] | None = None
    drift: Drift | None = None

    def figures(self) -> dict[str, Any]:
        """Every figure by its name: numbers, and lists of numbers over time."""
        found: dict[str, Any] = {}
        if self.nats is not None:
            found |= flattened(asdict(self.nats))
        if self.prompts is not None:
            found |= _of_prompts(self.prompts)
        if self.sampler is not None:
            found |= flattened(asdict(self.sampler), "sampler")
        for name, quality in (self.codec or {}).items():
            found |= flattened(asdict(quality), name)
        families: dict[str, Mapping[str, Any] | None] = {
            "distance": self.distances,
            "motion": self.steadiness,
            "physics": self.physics,
        }
        for family, values in families.items():
            for name, value in (values or {}).items():
                found |= flattened(asdict(value), f"{family}.{name}")
        if self.drift is not None:
            found |= _of_drift(self.drift)
        return found

    def document(self) -> dict[str, Any]:
        """What `evaluation.json` and `--json` hold."""
        return {"format": FORMAT, "about": asdict(self.about), **self.figures()}

    def metrics(self) -> dict[str, float]:
        """The figures that are finite numbers, as MLflow takes them."""
        return {
            name: float(value)
            for name, value in self.figures().items()
            if isinstance(value, int | float) and math.isfinite(value)
        }

    def series(self) -> dict[str, tuple[float, ...]]:
        """The figures that are lists over time, first to last."""
        return {name: value for name, value in self.figures().items() if isinstance(value, tuple)}


def _of_prompts(prompts: PromptFollowing) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sets: Mapping[str, Mapping[str, Share]] = {
        "seen": prompts.seen,
        "unseen": prompts.unseen,
        "ceiling.real": prompts.real,
        "ceiling.codec": prompts.codec,
    }
    for name, by_attribute in sets.items():
        for attribute, share in by_attribute.items():
            key = f"{name}.{attribute}"
            found[key] = share.value
            found[f"{key}_low"], found[f"{key}_high"] = share.low, share.high
            found[f"{key}_unsure"] = share.unsure / share.count
            found[f"{key}_count"] = share.count
    return found | {f"chance.{name}": value for name, value in prompts.chance.items()}


def _of_drift(drift: Drift) -> dict[str, Any]:
    found: dict[str, Any] = {
        "drift.prompt": drift.prompt,
        "drift.worst": drift.worst,
        "drift.worst_to_20x": drift.worst_to_20x,
    }
    for index, window in enumerate(drift.windows):
        name = "first" if index == 0 else f"at_{window.end_s:.0f}s"
        found |= flattened(asdict(window), f"drift.{name}")
    found["drift.nats_per_dim_by_frame"] = drift.nats_per_dim_by_frame
    return found
