"""READ FIRST. The whole of Flowreel in the order it happens: video shards → latent shards → checkpoint → video.

`demo` at the end calls the stages one after the other; every stage is also a command of its own. A stage that finds its work
done does nothing, one that was interrupted goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.on_ray import prepare
from data_prep.run import PrepareReport, plan_caption_run, shards_left
from data_prep.sources.moving_shapes import COLOURS, write_world
from flow.codec_factors import read_factors
from pipeline.client import Request, Video, VideoClient
from pipeline.cluster import local_or_given
from pipeline.console import Reporter
from pipeline.demo_figures import (
    captions_to_show,
    codec_quality,
    colour_accuracy,
    colour_prompts,
    likelihoods,
)
from pipeline.recipes import Recipe, save_recipe
from pipeline.report import Sample, overlap_s, write_report
from serving.config import ServiceSpec
from serving.on_ray import ServedApp, serve_model
from training.history import read_history
from training.on_ray import train_on_ray
from training.run import TrainRequest, TrainResult, check_run

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Served:
    """What the serving stage made: videos for the report, the colours read back, and every request's spans."""

    samples: list[Sample]
    colour_videos: list[tuple[str, np.ndarray]]
    spans: list[list[dict[str, Any]]]


def make_shards(recipe: Recipe, out: Path, reporter: Reporter) -> list[str]:
    """Video shards: the moving-shapes world, written as Panda-70M's downloader writes clips."""
    world = recipe.world
    with reporter.progress("writing shards") as update:
        paths = write_world(
            out,
            world.num_clips,
            world.num_images,
            clips_per_shard=world.clips_per_shard,
            progress=lambda done, total: update(done, total, "samples"),
        )
    return [str(path) for path in paths]


def prepare_latents(
    recipe: Recipe, shards: list[str], out: str | Path, reporter: Reporter, *, redo: bool = False
) -> PrepareReport:
    """Video shards → latent shards, on Ray Data; prints what became of every sample."""
    with reporter.progress("preparing") as update:
        report = prepare(
            recipe.prepare, shards, out, recipe.codec_source, redo=redo, progress=_samples(update)
        )
    rows = [[status, reason, str(count)] for status, reason, count in report.rows()]
    reporter.table(f"{report.total} samples", ["status", "reason", "samples"], rows)
    if report.samples_now == 0:
        reporter.console.print("  nothing to do: every shard was prepared before")
    else:
        reporter.console.print(f"  on {report.resources}")
    if report.reused_now:
        reporter.console.print(
            f"  {report.reused_now} of {report.samples_now} samples kept what was made of them before"
        )
    _say_captions(report, reporter)
    return report


def caption_again(
    recipe: Recipe, shards: list[str] | None, out: str | Path, reporter: Reporter
) -> PrepareReport:
    """Captions for latents that stand, from the recipe's captioner; latents are not touched."""
    with reporter.progress("captioning") as update:
        report = prepare(
            recipe.prepare,
            shards,
            out,
            recipe.codec_source,
            only="captions",
            progress=_samples(update),
        )
    kept, failed = report.counts.get("kept", 0), sum(report.captions_failed.values())
    reporter.console.print(f"  {kept - failed} of {kept} clips have a synthetic caption")
    if report.samples_now == 0:
        reporter.console.print("  nothing to do: every caption was written before")
    if report.unprepared_shards:
        names = ", ".join(report.unprepared_shards[:5])
        reporter.console.print(
            f"  {len(report.unprepared_shards)} shards have no latents yet ({names}): prepare them first"
        )
    _say_captions(report, reporter)
    return report


def _samples(update: Callable[[int, int, str], None]) -> Callable[[str, int, int | None], None]:
    """The progress of preparing as one line."""
    done = {"shards": 0, "samples": 0, "of": 0}

    def show(stage: str, count: int, total: int | None) -> None:
        done[stage] = count
        done["of"] = total or done["of"]
        update(done["shards"], done["of"], f"shards, {done['samples']} samples")

    return show


def _say_captions(report: PrepareReport, reporter: Reporter) -> None:
    if report.captions_failed:
        total = sum(report.captions_failed.values())
        codes = ", ".join(f"{code} {n}" for code, n in report.captions_failed.items())
        reporter.console.print(
            f"  {total} kept clips have no synthetic caption ({codes}); `flowreel prepare --only "
            "captions` tries them again"
        )


def captions_to_do(recipe: Recipe, shards: list[str] | None, out: str | Path) -> int:
    """How many shards `caption_again` would still have to caption."""
    return len(plan_caption_run(recipe.prepare, shards, out).jobs)


def shards_to_do(recipe: Recipe, shards: list[str], out: str | Path, *, redo: bool = False) -> int:
    """How many shards `prepare_latents` would still have to prepare."""
    return shards_left(recipe.prepare, shards, out, recipe.codec_source, redo=redo)


def training_to_do(recipe: Recipe, latents: str | Path, out: Path) -> bool:
    """Whether `train` would still have to take a step."""
    return check_run(train_request(recipe, latents, out)).finished() is None


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
    )


def train(recipe: Recipe, latents: str | Path, out: Path, reporter: Reporter) -> TrainResult:
    """Latent shards → checkpoint and model folder, on Ray Train."""
    said = ""
    with reporter.progress("training") as update:

        def show(records: list[dict[str, Any]]) -> None:
            nonlocal said
            for record in records:
                if record["mode"] == "video" and record["loss_nats_per_dim"] is not None:
                    said = f"{record['loss_nats_per_dim']:.3f} nats/dim"
            update(records[-1]["step"] + 1, recipe.train.steps, said)

        result = train_on_ray(train_request(recipe, latents, out), progress=show)
    if result.resumed_from == result.steps:
        reporter.console.print("  nothing to do: this run was finished before")
    elif result.resumed_from:
        reporter.console.print(f"  resumed from step {result.resumed_from}")
    return result


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
    """Model folder → HTTP endpoint, on Ray Serve; `stop()` it, or use it as a context manager."""
    return serve_model(
        ServiceSpec(
            model,
            data_dir,
            host=host or recipe.serve.host,
            port=recipe.serve.port if port is None else port,
            name=name,
            limits=recipe.serve.limits,
            resources=recipe.serve.resources,
            sampling=recipe.sampler,
        )
    )


def ask_for_samples(
    recipe: Recipe, url: str, prompts: list[str], out: Path, reporter: Reporter
) -> Served:
    """Videos over HTTP: the prompts to show, one frame continued, one video of three times the trained length, and a video for
    each colour prompt.
    """
    frames = recipe.prepare.bucket.num_frames
    colours = colour_prompts(recipe.evaluate.colour_clips)
    texts = list(dict.fromkeys([*prompts, *(prompt.text for prompt in colours)]))
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
    return Served(
        [video.sample for video in (*(videos[text] for text in prompts), *extra)],
        [(prompt.colour, videos[prompt.text].frames) for prompt in colours],
        [video.spans for video in (*videos.values(), *extra)],
    )


def demo(
    recipe: Recipe,
    out: Path,
    *,
    shards: list[str] | None = None,
    address: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Every stage in order; leaves videos, contact sheet, `report.html` and `summary.json` in `out`, and no process behind.

    Args:
        shards: WebDataset shards of your own; by default the moving-shapes world is made.
        address: a Ray cluster; by default one is started here and ended.
    """
    reporter = reporter or Reporter()
    started = time.monotonic()
    save_recipe(recipe, out)
    made = shards is None
    if shards is None:
        with reporter.stage("1 shards"):
            shards = make_shards(recipe, out / "shards", reporter)
    with local_or_given(recipe.cluster, address):
        with reporter.stage("2 prepare (Ray Data)"):
            prepared = prepare_latents(recipe, shards, out / "latents", reporter)
        with reporter.stage("3 train (Ray Train)"):
            trained = train(recipe, out / "latents", out / "train", reporter)
        with reporter.stage("4 evaluate"):
            summary: dict[str, Any] = dict(evaluate(recipe, trained.model_dir, out / "latents"))
        with reporter.stage("5 serve and sample (Ray Serve)"):
            shapes = [prompt.text for prompt in colour_prompts(4)]
            prompts = shapes if made else [*captions_to_show(out / "latents", 4), *shapes][:4]
            with serve(recipe, trained.model_dir, out / "served", name=recipe.name) as app:
                reporter.console.print(f"  serving at {app.url}")
                served = ask_for_samples(recipe, app.url, prompts, out, reporter)
    summary |= {
        **_seen(served),
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
        samples=served.samples,
        history=read_history(trained.history),
        spans=served.spans[0],
        statuses=summary["statuses"],
    )
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _say_where(out, page, summary, reporter)
    return summary


def _seen(served: Served) -> dict[str, Any]:
    """What the served videos and their spans show."""
    return {
        "colour_accuracy": colour_accuracy(served.colour_videos),
        "colour_chance": 1 / len(COLOURS),
        "colour_clips": len(served.colour_videos),
        "overlap_s": round(sum(overlap_s(spans) for spans in served.spans), 4),
    }


def _say_where(out: Path, page: Path, summary: dict[str, Any], reporter: Reporter) -> None:
    names = (
        "held_out_nats_per_dim", "gaussian_nats_per_dim", "shuffled_caption_nats_per_dim", "noise_floor_nats_per_dim",
        "colour_accuracy", "colour_chance", "codec_psnr_db", "overlap_s", "wall_s",
    )  # fmt: skip
    reporter.table("what was measured", ["", ""], [[n, f"{summary[n]:.3f}"] for n in names])
    lines = (
        f"report         {page}",
        f"contact sheet  {out / 'contact_sheet.png'}",
        f"videos         {out}/*.mp4",
        f"tracking       mlflow ui --backend-store-uri sqlite:///{out / 'train' / 'mlflow.db'}",
    )
    for line in lines:
        reporter.console.print(line, soft_wrap=True)
