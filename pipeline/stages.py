"""READ FIRST. The whole of Flowreel in order: video shards → latent shards → checkpoint → video.

`demo`, the first function, calls the stages one after the other; the stages follow in that order,
and each is also a command of its own. A stage that finds its work done does nothing, one that was
interrupted goes on. What the stages print is in `pipeline.tables`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.on_ray import prepare
from data_prep.progress import Pace, RunProgress, RunState
from data_prep.run import PrepareReport, plan_caption_run, shards_left
from data_prep.world.prompts import Prompt
from data_prep.world.prompts import prompts as world_prompts
from data_prep.world.shards import write_world
from flow.codec_factors import read_factors
from flowreel.files import write_whole
from media.frames import Frames
from media.write import encode_mp4
from pipeline.client import Request, Video, VideoClient
from pipeline.cluster import interrupts_kept, local_or_given
from pipeline.console import Reporter
from pipeline.demo_beside import beside_each_other, by_shipped_weights
from pipeline.demo_figures import (
    captions_to_show,
    codec_quality,
    codec_round_trip,
    likelihoods,
    overlap_s,
    prompt_figures,
    real_clips,
)
from pipeline.recipes import Recipe, save_recipe
from pipeline.report import Sample, write_report
from pipeline.run_samples import samples_of
from pipeline.tables import progress_words, say_captioned, say_prepared, say_summary
from pipeline.watch import training_shown
from serving.config import ServiceSpec
from serving.on_ray import ServedApp, serve_model
from training.curriculum import check_stages, stage_requests, walk
from training.on_ray import train_on_ray
from training.record.feed import add_to_record
from training.record.history import read_history
from training.run import TrainRequest, TrainResult, check_run
from training.stage import Stage


def demo(
    recipe: Recipe,
    out: Path,
    *,
    shards: list[str] | None = None,
    address: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run every stage in order; returns what was measured, as `summary.json` holds it.

    Leaves videos, contact sheet, `report.html` and `summary.json` in `out`, and no process behind.

    Args:
        out: folder of everything the run makes.
        shards: WebDataset shards of your own; by default the moving-shapes world is made.
        address: a Ray cluster; by default one is started here and ended.
        reporter: what is said on the way.
    """
    reporter = reporter or Reporter()
    started = time.monotonic()
    save_recipe(recipe, out)
    asked = judged_prompts(recipe)
    prompts = [prompt.text for prompt in asked[:SHOWN]]
    own_shards = shards is not None
    if shards is None:
        with reporter.stage("1 shards"):
            shards = make_shards(recipe, out / "shards", reporter)
    with local_or_given(recipe.cluster, address):
        with reporter.stage("2 prepare (Ray Data)"):
            prepared = prepare_latents(recipe, shards, out / "latents", reporter)
        with reporter.stage("3 train (Ray Train)"):
            trained = train(recipe, out / "latents", out / "train", reporter)
        with reporter.stage("4 evaluate"):
            figures = evaluate(recipe, trained.model_dir, out / "latents")
        with reporter.stage("5 serve and sample (Ray Serve)"):
            if own_shards:
                prompts = [*captions_to_show(out / "latents", SHOWN), *prompts][:SHOWN]
            generated = serve_and_sample(recipe, trained.model_dir, prompts, out, reporter)
    with reporter.stage("6 judge"):
        judged, beside = judge_videos(recipe, generated, out, shown=0 if own_shards else SHOWN)
        if not own_shards:
            beside += by_shipped_weights(prompts, recipe, out)
    summary = {
        **figures,
        **generated.figures(),
        **judged,
        "statuses": {f"{s} {r}".strip(): n for s, r, n in prepared.rows()},
        "steps": trained.steps,
        "resumed_from": trained.resumed_from,
        "mlflow_run_id": trained.mlflow_run_id,
        "stage_s": reporter.stage_s,
        "wall_s": round(time.monotonic() - started, 1),
    }
    page = write_report(
        out,
        title=f"Flowreel · {recipe.name}",
        summary=summary,
        samples=beside_each_other(generated.samples, beside),
        history=read_history(trained.history),
        spans=generated.spans[0],
        statuses=summary["statuses"],
    )
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    pages = [page, out / "summary.json", out / "contact_sheet.png"]
    add_to_record(out / "train", _numbers(figures), pages)
    say_summary(out, page, summary, reporter)
    return summary


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """What of a demo's evaluation is a number, by its name in MLflow."""
    return {f"evaluation/{k}": v for k, v in figures.items() if isinstance(v, int | float)}


SHOWN = 4
"""Prompts whose videos the demo's report shows."""
JUDGED_SEED = 1000
"""Of the judged prompts: the scenes of seed 0 are those that the world begins with."""


def make_shards(recipe: Recipe, out: Path, reporter: Reporter) -> list[str]:
    """Video shards: the moving-shapes world, written as Panda-70M's downloader writes clips."""
    world = recipe.world
    with reporter.progress("writing shards") as update:
        paths = write_world(
            out,
            world.num_clips,
            world.num_images,
            clips_per_shard=world.clips_per_shard,
            kinds=world.kinds,
            height=world.height,
            width=world.width,
            frames=world.frames,
            fps=world.fps,
            progress=lambda done, total: update(done, total, "samples"),
        )
    return [str(path) for path in paths]


def prepare_latents(
    recipe: Recipe, shards: list[str], out: str | Path, reporter: Reporter, *, redo: bool = False
) -> PrepareReport:
    """Video shards → latent shards, on Ray Data; prints what became of every sample."""
    with reporter.progress("preparing", timed=False) as update:
        report = prepare(
            recipe.prepare, shards, out, recipe.codec_source, redo=redo, progress=_samples(update)
        )
    say_prepared(report, reporter)
    return report


def caption_again(
    recipe: Recipe, shards: list[str] | None, out: str | Path, reporter: Reporter
) -> PrepareReport:
    """New captions from the recipe's captioner for latents that stand; latents are not touched."""
    with reporter.progress("captioning", timed=False) as update:
        report = prepare(
            recipe.prepare,
            shards,
            out,
            recipe.codec_source,
            only="captions",
            progress=_samples(update),
        )
    say_captioned(report, reporter)
    return report


def train_request(recipe: Recipe, latents: str | Path, out: Path) -> TrainRequest:
    """What a recipe asks of training, on these latents."""
    return TrainRequest(
        config=recipe.train,
        flow=recipe.model,
        text=recipe.text,
        dataset=latents,
        out=out,
        codec=Path(recipe.codec_source),
        video=recipe.stated_video,
        name=recipe.name,
    )


def train(
    recipe: Recipe, latents: str | Path, out: Path, reporter: Reporter, *, watch: bool = False
) -> TrainResult:
    """Latent shards → checkpoint and model folder, on Ray Train; stage by stage where there are.

    watch: show the whole of `pipeline.watch` instead of a line, where there is a terminal.
    """
    request, stages = train_request(recipe, latents, out), recipe.curriculum
    look = samples_of(recipe, latents)

    def one(request: TrainRequest, title: str) -> TrainResult:
        for note in check_run(request).notes:
            reporter.say(f"  {note}")
        with training_shown(request, reporter, title, watch=watch) as progress, interrupts_kept():
            result = train_on_ray(request, progress=progress, look=look)
        _say_resumed(result, reporter)
        return result

    def one_stage(stage: Stage, request: TrainRequest) -> TrainResult:
        number = 1 + [other.name for other in stages].index(stage.name)
        title = f"stage {number} of {len(stages)}, {stage.name}"
        reporter.say(f"  {title}: {stage.train.steps:,} steps")
        return one(request, title)

    return walk(request, stages, one_stage) if stages else one(request, "training")


def _say_resumed(result: TrainResult, reporter: Reporter) -> None:
    if result.resumed_from == result.steps:
        reporter.outcome("  nothing to do: this run was finished before")
    elif result.resumed_from:
        reporter.say(f"  resumed from step {result.resumed_from}")


def evaluate(recipe: Recipe, model: Path, latents: str | Path) -> dict[str, float]:
    """What was learnt, as likelihoods, and what the codec loses."""
    bucket = recipe.prepare.bucket
    figures = likelihoods(model, latents, draws=recipe.evaluate.noise_draws)
    figures["codec_psnr_db"] = codec_quality(recipe.codec_source, bucket.num_frames, bucket.fps)
    return figures


def serve(
    recipe: Recipe,
    model: Path,
    data_dir: Path,
    *,
    host: str | None = None,
    port: int | None = None,
    name: str | None = None,
) -> ServedApp:
    """Model folder → HTTP endpoint, on Ray Serve; `stop()` it, or use it as a context manager.

    Args:
        host, port: where it listens; by default where the recipe says. Port 0 takes a free one.
    """
    port = recipe.serve.port if port is None else port
    return serve_model(
        ServiceSpec(
            model,
            data_dir,
            host=host or recipe.serve.host,
            # Where nobody names a port, the service's own default holds.
            **({} if port is None else {"port": port}),
            name=name,
            limits=recipe.serve.limits,
            resources=recipe.serve.resources,
            sampling=recipe.sampler,
        )
    )


def judged_prompts(recipe: Recipe) -> list[Prompt]:
    """The prompts whose videos are judged: seen combinations, and scenes that no training shows."""
    count = max(SHOWN, recipe.evaluate.prompts)
    return world_prompts(count, kinds=recipe.world.kinds, seed=JUDGED_SEED)


@dataclass(frozen=True)
class Generated:
    """What the service made: videos to show, those that are judged, each request's spans.

    Attributes:
        samples: for the report.
        asked: prompts of the videos that are judged.
        videos: these, uint8 [T, H, W, 3] each.
        spans: per request, when each replica worked on which frame.
    """

    samples: list[Sample]
    asked: list[Prompt]
    videos: list[Frames]
    spans: list[list[dict[str, Any]]]

    def figures(self) -> dict[str, Any]:
        """What the spans show."""
        return {"overlap_s": round(sum(overlap_s(spans) for spans in self.spans), 4)}


def serve_and_sample(
    recipe: Recipe, model: Path, prompts: list[str], out: Path, reporter: Reporter
) -> Generated:
    """A service for as long as it takes to ask it for the demo's videos."""
    # It lives for seconds, so any free port does, unless the recipe names one.
    port = recipe.serve.port or 0
    with serve(recipe, model, out / "served", port=port, name=recipe.name) as app:
        reporter.say(f"  serving at {app.url}")
        return ask_for_samples(recipe, app.url, prompts, out, reporter)


def ask_for_samples(
    recipe: Recipe, url: str, prompts: list[str], out: Path, reporter: Reporter
) -> Generated:
    """Make videos over HTTP: as any client would, one request after the other.

    These are the prompts to show, one frame continued, one video of three times the trained length,
    and a video for each prompt that is judged.
    """
    frames = recipe.prepare.bucket.num_frames
    asked = judged_prompts(recipe)
    texts = list(dict.fromkeys([*prompts, *(prompt.text for prompt in asked)]))
    requests = [Request("text to video", text, frames, seed) for seed, text in enumerate(texts)]
    factors = read_factors(recipe.codec_source)
    long_frames = factors.video_frames(3 * factors.latent_frames(frames))
    videos: dict[str, Video] = {}
    extra: list[Video] = []
    with VideoClient(url) as client, reporter.progress("generating") as update:
        total = len(requests) + 2
        for request in requests:
            videos[request.prompt] = client.make(request, out)
            update(len(videos), total, request.prompt)
        given = videos[prompts[1]].frames[0]
        for request in (
            Request("image to video", prompts[1], frames, 101, image=given),
            Request("long video", prompts[2], long_frames, 102),
        ):
            extra.append(client.make(request, out))
            update(len(videos) + len(extra), total, f"{request.kind}: {request.prompt}")
    return Generated(
        [video.sample for video in (*(videos[text] for text in prompts), *extra)],
        asked,
        [videos[prompt.text].frames for prompt in asked],
        [video.spans for video in (*videos.values(), *extra)],
    )


def judge_videos(
    recipe: Recipe, generated: Generated, out: Path, *, shown: int
) -> tuple[dict[str, Any], list[Sample]]:
    """Whether videos show what was asked for, beside chance and what the codec lets through.

    Args:
        shown: for so many prompts, a real clip and what the codec makes of it are put beside the
            generated one in the report.
    """
    asked, bucket = generated.asked, recipe.prepare.bucket
    real = real_clips(asked, bucket)
    back = codec_round_trip(recipe.codec_source, real)
    figures = {
        **prompt_figures(asked, generated.videos, bucket.fps),
        **prompt_figures(asked, list(back), bucket.fps, name="after_codec"),
        "judged_clips": len(asked),
    }
    beside = []
    for number, prompt in enumerate(asked[:shown]):
        for kind, frames in (("real clip", real[number]), ("real, after the codec", back[number])):
            path = out / f"{kind.replace(',', '').replace(' ', '-')}-{number:03d}.mp4"
            write_whole(path, encode_mp4(frames, bucket.fps))
            beside.append(Sample(prompt.text, kind, path, frames))
    return figures, beside


# What is left to do, asked before Ray is started: nothing is written.


def shards_to_do(recipe: Recipe, shards: list[str], out: str | Path, *, redo: bool = False) -> int:
    """How many shards `prepare_latents` would still have to prepare."""
    return shards_left(recipe.prepare, shards, out, recipe.codec_source, redo=redo)


def captions_to_do(recipe: Recipe, shards: list[str] | None, out: str | Path) -> int:
    """How many shards `caption_again` would still have to caption."""
    return len(plan_caption_run(recipe.prepare, shards, out).jobs)


def training_to_do(recipe: Recipe, latents: str | Path, out: Path) -> bool:
    """Whether `train` would still have to take a step."""
    request, stages = train_request(recipe, latents, out), recipe.curriculum
    if not stages:
        return check_run(request).finished() is None
    check_stages(stages)
    return any(
        # A later stage cannot be checked before there is what it starts from.
        not asked.out.is_dir() or check_run(asked).finished() is None
        for asked in stage_requests(request, stages)
    )


# How preparing's own progress becomes one line.


def _samples(update: Callable[[int, int, str], None]) -> RunProgress:
    """The progress of preparing: shards of shards, and what is known of its samples."""
    pace = Pace()

    def show(state: RunState) -> None:
        pace.take(state)
        update(state.shards, state.of_shards, f"shards, {progress_words(state, pace)}")

    return show
