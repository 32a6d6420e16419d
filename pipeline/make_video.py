"""`flowreel sample`: one video made in this process, by the session code that the service runs.

Prompt, model folder and settings in; frames, and an mp4 or png, out. Starts no cluster. Knows
nothing of Ray, HTTP or training.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from flowreel.errors import FlowreelError
from flowreel.files import write_whole
from media.frames import Frames
from media.write import decode_image, encode_mp4, encode_png
from pipeline.console import Reporter
from pipeline.recipes import Recipe
from pipeline.tables import sampling_lines
from serving.config import Limits
from serving.loading import LoadedModel, load
from serving.messages import Chunk, GeneratedVideo
from serving.requests import CreateVideo, Generation, from_validation
from serving.session import generate


class VideoFileError(FlowreelError, ValueError):
    """A file that cannot hold what was made."""


@dataclass(frozen=True)
class VideoOptions:
    """What a user asks of one video.

    Attributes:
        prompt: what is to be seen.
        num_frames: video frames; None: the length the model was trained on.
        seed: of the noise.
        guidance: weight w; None: the recipe's default.
        schedule: how the deep block is inverted.
        image: file of a first frame to continue.
        certify: prove by one more pass how exact the sample is.
    """

    prompt: str
    num_frames: int | None = None
    seed: int = 0
    guidance: float | None = None
    schedule: str = "jacobi"
    image: Path | None = None
    certify: bool = False


def sample_video(
    recipe: Recipe,
    model: Path,
    options: VideoOptions,
    out: Path | None,
    reporter: Reporter | None = None,
) -> Frames:
    """Make one video here and write it; returns its frames, uint8 [T, H, W, 3].

    Args:
        recipe: whose sampler and limits hold.
        model: model folder.
        options: what is to be made.
        out: ends in .mp4, or in .png for one frame; by default sample.mp4 or sample.png.
        reporter: what is said on the way.

    Raises:
        VideoFileError: a .png for several frames.
        InvalidRequest: a value over a limit, or one that the model cannot make.
        CheckpointError, CodecError, TextError: a part of the model is missing.
    """
    reporter = reporter or Reporter()
    torch.set_num_threads(recipe.serve.resources.threads)
    loaded = load(model, sampling=recipe.sampler)
    out = out or Path("sample.mp4" if loaded.model.config.video else "sample.png")
    request = request_for(
        loaded,
        recipe.serve.limits,
        options.prompt,
        num_frames=options.num_frames,
        seed=options.seed,
        guidance=options.guidance,
        schedule=options.schedule,
        given_first_frame=options.image is not None,
    )
    if out.suffix.lower() == ".png" and request.num_frames > 1:
        raise VideoFileError(f"{out} holds one frame; {request.num_frames} frames need a .mp4")
    picture = None
    if options.image is not None:
        data = options.image.read_bytes()
        picture = decode_image(data, max_pixels=recipe.serve.limits.image_pixels)
    with reporter.progress("sampling") as update:
        num_ready = 0

        def count(chunk: Chunk) -> None:
            nonlocal num_ready
            num_ready += len(chunk.frames)
            update(num_ready, request.num_frames, "frames")

        video = generate(loaded, request, picture, on_chunk=count, certify=options.certify)
    write_video(out, video)
    moving = out.suffix.lower() != ".png"
    what = f"{len(video.frames)} frames at {video.fps:g} fps" if moving else "an image"
    reporter.outcome(f"{out}: {what}, seed {options.seed}")
    for line in sampling_lines(video):
        reporter.say(line)
    reporter.document({"path": out, "seed": options.seed, **_values(video)})
    return video.frames


def request_for(
    loaded: LoadedModel,
    limits: Limits,
    prompt: str,
    *,
    num_frames: int | None,
    seed: int,
    guidance: float | None,
    schedule: str,
    given_first_frame: bool,
) -> Generation:
    """The request for one video made in this process, held against the service's own limits.

    Raises:
        InvalidRequest: a value is over a limit, or is not what the model can make.
    """
    try:
        asked = CreateVideo(
            prompt=prompt,
            num_frames=loaded.facts.num_frames if num_frames is None else num_frames,
            guidance=guidance,
            seed=seed,
            schedule=schedule,  # type: ignore[arg-type]
        )
    except ValidationError as error:
        raise from_validation(error) from error
    return Generation.admit(
        asked,
        loaded.facts,
        limits,
        request_id=secrets.token_hex(8),
        seed=seed,
        given_first_frame=given_first_frame,
    )


def write_video(path: Path, video: GeneratedVideo) -> None:
    """Write an mp4, or the first frame as a png; the file is there whole or not at all."""
    if path.suffix.lower() == ".png":
        write_whole(path, encode_png(video.frames[0]))
    else:
        write_whole(path, encode_mp4(video.frames, fps=video.fps))


def _values(video: GeneratedVideo) -> dict[str, object]:
    """Its size, what sampling took, and its certificate, as plain values for `--json`."""
    took = video.counters
    num_frames, height, width = video.frames.shape[:3]
    return {
        "frames": num_frames,
        "height": height,
        "width": width,
        "fps": video.fps,
        "deep_block": None
        if took is None
        else {
            "iterations": took.iterations,
            "ms_per_iteration": took.ms_per_iteration,
            "evaluations_per_token": took.evaluations_per_token,
            "tokens_per_s": took.tokens_per_s,
        },
        "certificate": video.certificate,
    }
