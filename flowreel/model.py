"""A trained model in this process: load it, sample a video, ask how likely a video is.

Every call goes through the code of the commands `flowreel sample` and `flowreel likelihood`
(`pipeline.make_video`, `pipeline.video_likelihood`), so that a seed gives the same video from
Python, from the command line and from the service. Starts no cluster. Knows nothing of training,
of Ray, or of HTTP.

Shapes: T video frames, H, W pixels; t latent frames, h, w tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from flow.certificate import Certificate
from flow.config import FlowConfig
from flow.counters import Counters
from flow.likelihood import over_draws
from flow.sample_spec import Schedule
from flow.video_spec import VideoSpec
from flowreel.errors import FlowreelError
from flowreel.files import write_whole
from media.errors import UnreadableImage
from media.frames import Frames
from media.write import decode_image, encode_mp4, encode_png
from pipeline.make_video import request_for
from pipeline.recipes import Recipe, load_recipe
from pipeline.shipped import recipe_beside, shipped_model
from pipeline.video_likelihood import VideoFitError, fit_video, measure_likelihood
from serving.loading import LoadedModel
from serving.loading import load as load_session
from serving.session import generate

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SaveError(FlowreelError, ValueError):
    """A file that a video cannot be written to as asked."""


@dataclass(frozen=True)
class Video:
    """A video that a model made.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB.
        fps: frames per second.
        prompt, seed: what it was made from; the same two give the same video.
        counters: passes of the deep block, tokens evaluated, seconds (`flow.counters.Counters`).
        certificate: how far the noise of this sample is from the noise drawn
            (`flow.certificate.Certificate`); None where it was not asked for.

    Example:
        >>> Video(np.zeros((17, 64, 64, 3), np.uint8), 8.0, "a red circle", seed=3)
        Video(17 frames of 64x64 at 8 fps, seed 3, 'a red circle')
    """

    frames: Frames
    fps: float
    prompt: str
    seed: int
    counters: Counters | None = None
    certificate: Certificate | None = None

    def save(self, path: str | Path) -> Path:
        """Write an mp4 (H.264), or a png of a video of one frame; the file appears whole.

        Raises:
            SaveError: another ending, or a png of more than one frame.
            EncodeError: an mp4 of odd height or width.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".mp4", ".png"):
            raise SaveError(f"{path}: must end in .mp4, or in .png for a video of one frame")
        if ending == ".png" and len(self.frames) > 1:
            raise SaveError(f"{path} holds one frame; {len(self.frames)} frames need a .mp4")
        png = ending == ".png"
        write_whole(path, encode_png(self.frames[0]) if png else encode_mp4(self.frames, self.fps))
        return path

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        size = f"{count} frames of {width}x{height} at {self.fps:g} fps"
        return f"Video({size}, seed {self.seed}, {self.prompt!r})"


@dataclass(frozen=True)
class LogProb:
    """How likely a model finds a video, given a prompt: exact log-densities under the flow.

    The density is that of the video's latents with Gaussian noise of the model's σ, so every figure
    is a mean over seeded draws of that noise. `nats` and `bits_per_dim` include ½ ln 2π for each
    dimension, `loss` does not (`docs/design.md`, The model exactly).

    Attributes:
        nats: log p of the whole video, nats.
        stderr: standard error of `nats` over the draws, nats.
        bits_per_dim: -log p, bits per dimension.
        bits_per_dim_stderr: its standard error over the draws.
        loss: the training loss, nats per dimension.
        floor: ½ + ln σ: the least that a mean loss can be, nats per dimension.
        dims: numbers in the latents.
        draws: draws of the noise.
        frame_nats: fp64 [t], log p of each latent frame given those before it, nats.
        token_nats: fp64 [t, h, w], each token's share of its frame, nats.
    """

    nats: float
    stderr: float
    bits_per_dim: float
    bits_per_dim_stderr: float
    loss: float
    floor: float
    dims: int
    draws: int
    frame_nats: npt.NDArray[np.float64] = field(repr=False)
    token_nats: npt.NDArray[np.float64] = field(repr=False)


class Model:
    """A model folder in memory; `flowreel.load` makes one.

    It samples with the schedule's settings and within the limits of a recipe (`sampler` and
    `serve.limits`), as the command line does.
    """

    def __init__(self, loaded: LoadedModel, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self._loaded = loaded
        self._limits = recipe.serve.limits

    @property
    def config(self) -> FlowConfig:
        """The structure of the flow and its denoiser."""
        return self._loaded.model.config

    @property
    def video(self) -> VideoSpec:
        """The clips the model was trained on: frames, pixels, frames per second."""
        assert self._loaded.spec.video is not None, "loading refuses a folder without it"
        return self._loaded.spec.video

    def sample(
        self,
        prompt: str,
        *,
        num_frames: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        image: Frames | str | Path | None = None,
        schedule: Schedule = "jacobi",
        certify: bool = False,
        on_frames: Callable[[Frames], object] | None = None,
    ) -> Video:
        """Make one video; the same arguments give the same frames.

        Args:
            prompt: what is to be seen.
            num_frames: video frames, 4k+1 with a codec of that factor; None: the trained length.
                More than that slides a context window.
            seed: of the noise.
            guidance: classifier-free guidance weight w; 0 is none, None the recipe's default.
            image: first frame to continue: uint8 [H, W, 3], or a png, jpg or webp file; it is
                scaled and cropped to the model's size.
            schedule: how the deep block is inverted: "jacobi", "sliding" or "sequential".
            certify: prove how exact the sample is, by one more pass.
            on_frames: called with each group of frames, uint8 [n, H, W, 3], as soon as it is ready.

        Raises:
            InvalidRequest: a value over a limit, or frames that the codec cannot make.
            MediaError: `image` is no picture.
        """
        request = request_for(
            self._loaded,
            self._limits,
            prompt,
            num_frames=num_frames,
            seed=seed,
            guidance=guidance,
            schedule=schedule,
            given_first_frame=image is not None,
        )
        if isinstance(image, str | Path):
            image = _picture(Path(image), self._limits.image_pixels)
        made = generate(
            self._loaded,
            request,
            image,
            on_chunk=lambda chunk: _hand_over(chunk.frames, on_frames),
            certify=certify,
        )
        return Video(made.frames, made.fps, prompt, seed, made.counters, made.certificate)

    def log_prob(
        self,
        frames: Frames | Video | str | Path,
        prompt: str,
        *,
        draws: int = 8,
        seed: int = 0,
    ) -> LogProb:
        """How likely the model finds a video, given a prompt.

        Args:
            frames: uint8 [T, H, W, 3] of the model's size, at most its trained length; a `Video`;
                or a video file, whose beginning is cut and resized to what the model takes.
            draws: draws of the σ-noise, at least 1; with one there is no standard error (nan).
            seed: of the draws; the same draws for the same seed.

        Raises:
            VideoFitError: frames of another size, too long, or a file that is too short.
            CodecError: a number of frames that the codec cannot take.
            VideoError: a file that cannot be read.

        Warns:
            NoiseFloorWarning: the mean loss is clearly under ½ + ln σ.
        """
        measured = measure_likelihood(
            self._loaded, self._fitted(frames), prompt, draws=draws, seed=seed
        )
        density = measured.per_token
        whole = over_draws(density.log_prob("video")[:, 0])
        bits = over_draws(density.nll("video", "bits_per_dim")[:, 0])
        return LogProb(
            nats=float(whole.mean),
            stderr=float(whole.standard_error),
            bits_per_dim=float(bits.mean),
            bits_per_dim_stderr=float(bits.standard_error),
            loss=float(measured.loss().mean),
            floor=measured.floor,
            dims=density.dims("video"),
            draws=measured.draws,
            frame_nats=density.log_prob("frame")[:, 0].mean(0).cpu().numpy(),
            token_nats=density.log_prob("token")[:, 0].mean(0).cpu().numpy(),
        )

    def _fitted(self, frames: Frames | Video | str | Path) -> Frames:
        """The frames as the model takes them."""
        wanted = self.video
        height, width = wanted.height, wanted.width
        if isinstance(frames, str | Path):
            return fit_video(Path(frames), wanted.num_frames, height, width, wanted.fps)
        if isinstance(frames, Video):
            frames = frames.frames
        given = tuple(frames.shape)
        if len(given) != 4 or given[1:] != (height, width, 3) or given[0] > wanted.num_frames:
            raise VideoFitError(
                f"frames of shape {given}: this model takes at most {wanted.num_frames} frames of "
                f"[{height}, {width}, 3]; cut and resize them, or give a video file"
            )
        return np.ascontiguousarray(frames)

    def __repr__(self) -> str:
        video = self.video
        size = f"{video.num_frames} frames of {video.width}x{video.height} at {video.fps:g} fps"
        return f"Model({str(self.folder)!r}, {size})"


def _picture(path: Path, max_pixels: int) -> Frames:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(
            f"{path} cannot be read ({error.strerror}); give a png, jpg or webp file"
        ) from error
    return decode_image(data, max_pixels=max_pixels)


def _hand_over(frames: Frames, on_frames: Callable[[Frames], object] | None) -> None:
    # The denoiser looks ahead, so some chunks hold no frame yet.
    if on_frames is not None and len(frames):
        on_frames(frames)


def load(
    folder: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """Read a model folder, as training or `flowreel import-weights` leaves it.

    Args:
        folder: holds config.json and safetensors; by default the weights that ship.
        recipe: whose `sampler` and `serve.limits` are used: a recipe, its name or its file; by
            default recipe.yaml of the model or its run, else `tiny`.
        device: where it computes.
        dtype: of weights and products; densities and noise stay float32.

    Raises:
        CheckpointError, CodecError, TextError: a part is missing or does not fit.
        InvalidRequest: the folder does not say which videos the model makes.
        RecipeError: no such recipe, or a bad value in it.
        NoShippedModelError: no folder is given, and no weights ship with this copy.
    """
    folder = shipped_model() if folder is None else Path(folder)
    recipe = recipe or recipe_beside(folder)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    loaded = load_session(folder, device=device, dtype=_DTYPES[dtype], sampling=chosen.sampler)
    return Model(loaded, folder, chosen)


def sample(
    model: Model | str | Path,
    prompt: str,
    *,
    num_frames: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    image: Frames | str | Path | None = None,
    schedule: Schedule = "jacobi",
    certify: bool = False,
) -> Video:
    """Make one video with a model or a model folder; arguments and errors of `Model.sample`."""
    return _as_model(model).sample(
        prompt,
        num_frames=num_frames,
        seed=seed,
        guidance=guidance,
        image=image,
        schedule=schedule,
        certify=certify,
    )


def log_prob(
    model: Model | str | Path,
    frames: Frames | Video | str | Path,
    prompt: str,
    *,
    draws: int = 8,
    seed: int = 0,
) -> LogProb:
    """How likely a model or a model folder finds a video; see `Model.log_prob`."""
    return _as_model(model).log_prob(frames, prompt, draws=draws, seed=seed)


def _as_model(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else load(model)
