"""The clips of an evaluation, each made when it is first wanted, and once.

Knows the order of things. Knows nothing of figures or files.

Shapes: N clips, T video frames, H, W pixels; frames uint8 [N, T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from data_prep.world.scene import Scene
from media.frames import Frames
from pipeline.console import Reporter
from pipeline.evaluation import scenes
from pipeline.evaluation.codec_quality import round_trip
from pipeline.evaluation.options import Options
from pipeline.evaluation.samples import Sampling, make_videos
from pipeline.evaluation.scenes import Asked
from serving.loading import LoadedModel


@dataclass
class Clips:
    """Prompts and real clips, videos of the model, and the real clips after the codec."""

    loaded: LoadedModel
    options: Options
    reporter: Reporter

    @property
    def sampling(self) -> Sampling:
        """How videos are made."""
        return Sampling(self.options.guidance, self.options.schedule, self.options.seed)

    @cached_property
    def seen(self) -> Asked:
        """Prompts of seen combinations of words."""
        return self._asked("seen", self.options.seed)

    @cached_property
    def unseen(self) -> Asked:
        """Prompts of combinations that no training shows."""
        return self._asked("unseen", self.options.seed)

    @cached_property
    def others(self) -> Frames:
        """Real clips of as many other prompts of seen combinations."""
        return self._asked("seen", self.options.seed + 1).real_NTHWC

    @cached_property
    def made_seen(self) -> Frames:
        """A video for each prompt of `seen`."""
        return self.made("sampling, seen", self.seen.texts, self.options.seed)

    @cached_property
    def made_unseen(self) -> Frames:
        """A video for each prompt of `unseen`, from other noise than those of `seen`."""
        seed = self.options.seed + self.options.prompts
        return self.made("sampling, unseen", self.unseen.texts, seed)

    @cached_property
    def back_seen(self) -> Frames:
        """The real clips of `seen` after the codec's round trip."""
        return self.back("codec, seen", self.seen.real_NTHWC)

    @cached_property
    def back_unseen(self) -> Frames:
        """The real clips of `unseen` after the codec's round trip."""
        return self.back("codec, unseen", self.unseen.real_NTHWC)

    def has(self, name: str) -> bool:
        """Whether some family wanted these clips."""
        return name in self.__dict__

    def held_out(self, count: int, first: int = scenes.HELD_OUT_SEED) -> list[Scene]:
        """Scenes of any kind from seeds that no training uses."""
        return scenes.held_out_scenes(count, self.options.seed, self.options.kinds, first=first)

    def made(self, name: str, texts: Sequence[str], seed: int) -> Frames:
        """Videos of some prompts; `name` is what the progress says."""
        with self.reporter.progress(name) as update:
            return make_videos(
                self.loaded,
                texts,
                replace(self.sampling, seed=seed),
                lambda done, total: update(done, total, "videos"),
            )

    def back(self, name: str, frames_NTHWC: Frames) -> Frames:
        """Clips after the codec's round trip."""
        assert self.loaded.codec is not None
        with self.reporter.progress(name) as update:
            return round_trip(
                self.loaded.codec, frames_NTHWC, lambda done, total: update(done, total, "clips")
            )

    def _asked(self, split: scenes.Split, seed: int) -> Asked:
        options = self.options
        return scenes.asked(options.prompts, split, seed, options.kinds, self.loaded.facts)
