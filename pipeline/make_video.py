"""The commands that need no cluster, or only their own: sample, score, evaluate, serve.

Each is a few lines over a stage's public function, with what a person at a terminal expects to see.
"""

from __future__ import annotations

import secrets
import signal
import threading
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from flowreel.errors import FlowreelError
from media.read import read_video
from media.write import decode_image, encode_mp4, encode_png
from pipeline.console import Reporter
from pipeline.demo_figures import likelihoods
from pipeline.recipes import Recipe
from pipeline.video_likelihood import (
    check_per_token_path,
    score_video,
    write_per_token,
)
from serving.messages import GeneratedVideo
from serving.requests import CreateVideo, Generation, from_validation
from serving.session import generate, load


class VideoFitError(FlowreelError, ValueError):
    """A video that cannot be cut to what a model takes."""


def sample_video(
    recipe: Recipe,
    model: Path,
    prompt: str,
    out: Path | None,
    *,
    num_frames: int | None,
    seed: int,
    guidance: float | None,
    schedule: str,
    image: Path | None,
    certify: bool = False,
) -> np.ndarray:
    """Make one video here and write it; returns its frames, uint8 [T, H, W, 3].

    `out` ends in .mp4, or in .png for one frame; by default it is sample.mp4, of an image model sample.png.
    """
    reporter = Reporter()
    torch.set_num_threads(recipe.serve.resources.threads)
    loaded = load(model, sampler=recipe.sampler)
    if out is None:
        out = Path("sample.mp4" if loaded.model.config.video else "sample.png")
    try:
        asked = CreateVideo(
            prompt=prompt,
            num_frames=num_frames or loaded.facts.num_frames,
            guidance=guidance,
            seed=seed,
            schedule=schedule,  # type: ignore[arg-type]
        )
    except ValidationError as error:
        raise from_validation(error) from error
    request = Generation.admit(
        asked,
        loaded.facts,
        recipe.serve.limits,
        request_id=secrets.token_hex(8),
        seed=seed,
        given_first_frame=image is not None,
    )
    as_png = out.suffix.lower() == ".png"
    if as_png and request.num_frames > 1:
        raise VideoFitError(f"{out} holds one frame; {request.num_frames} frames need a .mp4")
    picture = None
    if image is not None:
        picture = decode_image(image.read_bytes(), max_pixels=recipe.serve.limits.image_pixels)
    with reporter.progress("sampling") as update:
        done = 0

        def count(chunk: object) -> None:
            nonlocal done
            done += len(chunk.frames)  # type: ignore[attr-defined]
            update(done, request.num_frames, "frames")

        video = generate(loaded, request, picture, on_chunk=count, certify=certify)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(
        encode_png(video.frames[0]) if as_png else encode_mp4(video.frames, fps=video.fps)
    )
    said = "an image" if as_png else f"{len(video.frames)} frames at {video.fps:g} fps"
    reporter.console.print(f"{out}: {said}, seed {seed}")
    for line in describe_sampling(video):
        reporter.console.print(line)
    return video.frames


def describe_sampling(video: GeneratedVideo) -> list[str]:
    """What sampling took and how exact it is, as lines for people."""
    lines = []
    if (took := video.counters) is not None:
        lines.append(
            f"deep block  {took.iterations} iterations of {took.ms_per_iteration:.1f} ms, "
            f"{took.evaluations_per_token:.1f} evaluations per token, {took.tokens_per_s:.0f} tokens/s"
        )
        sweeps = " ".join(str(work.iterations) for work in took.shallow)
        lines.append(f"shallow     {sweeps} sweeps, block by block")
    if (proof := video.certificate) is not None:
        lines.append(
            f"certificate |r| at most {proof.max_abs:.2g}, p99.9 {proof.p999_abs:.2g}: the exact sample of noise that far "
            "from the noise drawn"
        )
    return lines


def score_file(
    model: Path,
    video: Path,
    prompt: str,
    *,
    draws: int,
    seed: int,
    per_frame: bool = True,
    per_token: Path | None = None,
) -> None:
    """Print how likely the model finds a video file, as a whole and frame by frame; per_token: a file for all tokens."""
    from flow.model_folder import read_spec

    if per_token is not None:
        check_per_token_path(per_token)
    spec = read_spec(model)
    if spec.video is None:
        raise VideoFitError(f"{model} is no video model, so it cannot score a video")
    frames = fit_video(
        video, spec.video.num_frames, spec.video.height, spec.video.width, spec.video.fps
    )
    reporter = Reporter()
    with reporter.progress("scoring") as update:
        score = score_video(
            model,
            frames,
            prompt,
            draws=draws,
            seed=seed,
            progress=lambda done, total: update(done, total, "draws"),
        )
    for line in score.lines():
        reporter.console.print(line, soft_wrap=True)
    if per_frame:
        columns = ["latent", "frames", "nll nats/dim", "nll bits/dim", "loss nats/dim"]
        reporter.table("each frame given those before it", columns, score.frame_rows())
    if per_token is not None:
        write_per_token(per_token, score, frames, prompt)
        reporter.console.print(f"every token: {per_token}", soft_wrap=True)


def evaluate_model(model: Path, latents: Path, *, draws: int) -> None:
    """Print held-out likelihoods of a model beside their baselines."""
    found = likelihoods(model, latents, draws=draws)
    rows = [
        ["held out, true captions", f"{found['held_out_nats_per_dim']:.4f} ± {found['held_out_stderr']:.4f}"],
        ["held out, shuffled captions", f"{found['shuffled_caption_nats_per_dim']:.4f}"],
        ["best Gaussian per channel", f"{found['gaussian_nats_per_dim']:.4f}"],
        ["noise floor ½ + ln σ", f"{found['noise_floor_nats_per_dim']:.4f}"],
    ]  # fmt: skip
    reporter = Reporter()
    clips = f"{found['held_out_clips']:.0f} clips, {draws} noise draws"
    reporter.table(clips, ["loss (½ ln 2π left out)", "nats/dim"], rows)
    bits = found["held_out_nll_bits_per_dim"]
    reporter.console.print(f"nll {bits:.4f} bits/dim (held out, true captions, ½ ln 2π included)")


def fit_video(path: Path, num_frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """The beginning of a video file at a model's frame rate and size, uint8 [T, height, width, 3].

    Raises:
        VideoError: it cannot be read.
        VideoFitError: it is too short.
    """
    from data_prep.clips.cut import fit_frame

    clip = read_video(path)
    times = clip.pts_s[0] + np.arange(num_frames) / fps
    end_s = clip.pts_s[-1] + 1 / fps
    if times[-1] > end_s:
        raise VideoFitError(
            f"{path} is {end_s - clip.pts_s[0]:.2f} s long; the model takes {num_frames} frames at {fps:g} fps, "
            f"{num_frames / fps:.2f} s"
        )
    nearest = np.abs(np.asarray(clip.pts_s)[None] - times[:, None]).argmin(1)
    return np.stack([fit_frame(clip.frames[i], height, width) for i in nearest])


def serve_until_interrupted(
    recipe: Recipe, model: Path, *, host: str, port: int, data_dir: Path, address: str | None
) -> None:
    """Serve until SIGINT or SIGTERM, then leave no process behind."""
    from pipeline.cluster import local_or_given
    from pipeline.stages import serve

    reporter, stop = Reporter(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with (
        local_or_given(recipe.cluster, address),
        serve(recipe, model, data_dir, host=host, port=port) as served,
    ):
        reporter.console.print(f"serving {model} at {served.url}  (Ctrl-C ends it)")
        reporter.console.print(
            f"  curl {served.url}/v1/videos -H 'content-type: application/json' -d '{{\"prompt\": \"A red circle moves left\"}}'",
            soft_wrap=True,
        )
        stop.wait()
        reporter.console.print("stopping")
