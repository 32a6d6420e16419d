"""`flowreel likelihood`: how likely a model finds one video, and which parts of it surprise it.

A video file and a prompt in; negative log-likelihood and training loss out, of the video, of each
latent frame given those before it, and of each token, over seeded noise draws (`flow.likelihood`
defines all of them). Starts no cluster. Knows nothing of Ray, HTTP or training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.clips.cut import fit_frame
from flow.codec_factors import CodecFactors
from flow.likelihood import (
    Estimate,
    Likelihood,
    Per,
    check_noise_floor,
    draw_noise,
    noise_floor,
    noisy_likelihood,
    over_draws,
)
from flow.model_folder import read_spec
from flowreel.errors import FlowreelError
from flowreel.files import replacing
from media.frames import Frames
from media.read import read_video
from pipeline.console import Reporter
from serving.session import LoadedModel, load, prompt_text

PER_TOKEN_SUFFIXES = (".npz", ".png")
PICTURES_PER_ROW = 7


class PerTokenFileError(FlowreelError, ValueError):
    """A file for per-token figures that cannot be written as asked."""


class VideoFitError(FlowreelError, ValueError):
    """A video that cannot be cut to what a model takes."""


@dataclass(frozen=True)
class VideoLikelihood:
    """How likely a model finds one video's σ-noised latents: exact log-densities under the flow.

    Attributes:
        per_token: a likelihood [D, 1, T, H, W] over D noise draws.
        sigma: standard deviation of the noise.
        factors: what one latent stands for, in pixels and in video frames.
        patch_size: latent rows and columns of a token.
    """

    per_token: Likelihood
    sigma: float
    factors: CodecFactors
    patch_size: int = 1

    @property
    def floor(self) -> float:
        """½ + ln σ: the least mean loss, nats per dimension."""
        return noise_floor(self.sigma)

    @property
    def draws(self) -> int:
        """How many noise draws are behind every mean."""
        return len(self.per_token.loss_BTHW)

    @property
    def token_pixels(self) -> int:
        """Pixels on the side of what one token sees."""
        return self.patch_size * self.factors.space

    def loss(self) -> Estimate:
        """Of the video, nats per dimension, ½ ln 2π left out; fp64 scalars."""
        return over_draws(self.per_token.loss("video", "nats_per_dim")[:, 0])

    def values(self) -> dict[str, Any]:
        """All figures of the video and of its frames, as plain values for `--json`."""
        density = self.per_token
        return {
            **_figures(density, "video"),
            "log_prob_nats": _estimate(over_draws(density.log_prob("video")[:, 0])),
            "floor_nats_per_dim": self.floor,
            "dimensions": density.dims("video"),
            "draws": self.draws,
            "frames": [
                {"latent_frame": n, "video_frames": self._video_frames(n), **figures}
                for n, figures in enumerate(_by_frame(_figures(density, "frame")))
            ],
        }

    def lines(self) -> list[str]:
        """The figures of the whole video, as a person reads them."""
        density = self.per_token

        def both(name: str) -> str:
            value = density.nll if name == "nll" else density.loss
            nats, bits = (
                _said(over_draws(value("video", unit)[:, 0]))
                for unit in ("nats_per_dim", "bits_per_dim")
            )
            return f"{nats} nats/dim   {bits} bits/dim"

        total = over_draws(density.log_prob("video")[:, 0])
        return [
            f"nll    {both('nll')}   negative log-likelihood, ½ ln 2π per dimension included",
            f"loss   {both('loss')}   the same without ½ ln 2π, as in training",
            f"floor  {self.floor:.4f} nats/dim: ½ + ln σ, no model's mean loss is below it",
            f"log p(video) = {_said(total, 1)} nats over {density.dims('video')} dimensions; "
            f"mean ± standard error over {self.draws} noise draws",
        ]

    def frame_rows(self) -> list[list[str]]:
        """A row for each latent frame.

        It holds the frame's number, the video frames it stands for, nll in nats and in bits per
        dimension, and loss in nats per dimension.
        """
        density = self.per_token
        columns = [
            over_draws(value[:, 0])
            for value in (
                density.nll("frame", "nats_per_dim"),
                density.nll("frame", "bits_per_dim"),
                density.loss("frame", "nats_per_dim"),
            )
        ]
        rows = []
        for n in range(density.loss_BTHW.shape[-3]):
            said = [_said(Estimate(c.mean[n], c.standard_error[n])) for c in columns]
            first, last = self._video_frames(n)
            rows.append([str(n), str(first) if first == last else f"{first}-{last}", *said])
        return rows

    def _video_frames(self, latent_frame: int) -> tuple[int, int]:
        """The first and the last video frame that a latent frame stands for."""
        frames = self.factors.frames_behind(latent_frame)
        return frames[0], frames[-1]


def _figures(density: Likelihood, per: Per) -> dict[str, Any]:
    return {
        "nll_nats_per_dim": _estimate(over_draws(density.nll(per, "nats_per_dim")[:, 0])),
        "nll_bits_per_dim": _estimate(over_draws(density.nll(per, "bits_per_dim")[:, 0])),
        "loss_nats_per_dim": _estimate(over_draws(density.loss(per, "nats_per_dim")[:, 0])),
    }


def _estimate(value: Estimate) -> dict[str, Any]:
    return {"mean": value.mean.tolist(), "standard_error": value.standard_error.tolist()}


def _by_frame(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures whose values are lists over frames, as a list of figures."""
    count = len(next(iter(figures.values()))["mean"])
    return [
        {name: {key: values[n] for key, values in each.items()} for name, each in figures.items()}
        for n in range(count)
    ]


def _said(value: Estimate, digits: int = 4) -> str:
    return f"{float(value.mean):.{digits}f} ± {float(value.standard_error):.{digits}f}"


def likelihood_of_file(
    model: Path,
    video: Path,
    prompt: str,
    *,
    draws: int,
    seed: int,
    per_frame: bool = True,
    per_token: Path | None = None,
    reporter: Reporter | None = None,
) -> VideoLikelihood:
    """Print how likely a model finds a video file, as a whole and frame by frame.

    Args:
        model: model folder.
        video: its beginning is cut and resized to what the model was trained on.
        prompt: what is to be seen.
        draws, seed: of the noise.
        per_frame: print a table of the latent frames.
        per_token: a .npz or .png for the figures of every token.
        reporter: what is said on the way.

    Raises:
        VideoFitError: an image model, or a video that is too short.
        VideoError: the file is no video.
    """
    reporter = reporter or Reporter()
    if per_token is not None:
        check_per_token_path(per_token)
    spec = read_spec(model)
    if spec.video is None:
        raise VideoFitError(f"{model} names no video size, so no video can be cut for it")
    wanted = spec.video
    frames = fit_video(video, wanted.num_frames, wanted.height, wanted.width, wanted.fps)
    with reporter.progress("noise draws") as update:
        likelihood = measure_likelihood(
            model,
            frames,
            prompt,
            draws=draws,
            seed=seed,
            progress=lambda done, total: update(done, total, "draws"),
        )
    for line in likelihood.lines():
        reporter.outcome(line)
    if per_frame:
        columns = ["latent", "frames", "nll nats/dim", "nll bits/dim", "loss nats/dim"]
        reporter.table("each frame given those before it", columns, likelihood.frame_rows())
    if per_token is not None:
        write_per_token(per_token, likelihood, frames, prompt)
        reporter.outcome(f"every token: {per_token}")
    reporter.document({**likelihood.values(), "per_token": per_token})
    return likelihood


def fit_video(path: Path, num_frames: int, height: int, width: int, fps: float) -> Frames:
    """The beginning of a video file at a model's frame rate and size: uint8 [T, height, width, 3].

    Raises:
        VideoError: it cannot be read.
        VideoFitError: it is too short.
    """
    clip = read_video(path)
    times = clip.pts_s[0] + np.arange(num_frames) / fps
    end_s = clip.pts_s[-1] + 1 / fps
    if times[-1] > end_s:
        raise VideoFitError(
            f"{path} is {end_s - clip.pts_s[0]:.2f} s long; the model takes {num_frames} frames at "
            f"{fps:g} fps, {num_frames / fps:.2f} s: give a longer video"
        )
    nearest = np.abs(np.asarray(clip.pts_s)[None] - times[:, None]).argmin(1)
    return np.stack([fit_frame(clip.frames[i], height, width) for i in nearest])


def measure_likelihood(
    model: LoadedModel | Path,
    frames: Frames,
    prompt: str,
    *,
    draws: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> VideoLikelihood:
    """How likely a model finds a video given a prompt.

    Args:
        model: a loaded model, or a model folder.
        frames: uint8 [T, H, W, 3] at the model's size and frame rate, as many as its codec takes.
        prompt: what is to be seen.
        draws: seeded draws of the σ-noise that the flow's latents carry (and of the codec's
            posterior, where the model was trained on samples of it).
        seed: of the draws.
        progress: called with (draws done, draws in all).

    Warns:
        NoiseFloorWarning: the mean loss is clearly under ½ + ln σ.
    """
    loaded = model if isinstance(model, LoadedModel) else load(model)
    assert loaded.codec is not None
    assert loaded.text_encoder is not None
    mean, logvar = loaded.codec.encode(torch.from_numpy(frames)[None])
    text = loaded.text_encoder.encode([prompt_text(prompt, loaded, len(frames))]).to(mean.device)
    convention, config = loaded.codec.convention, loaded.model.config

    def clean(draw: int) -> Tensor:
        noise = draw_noise(seed, draw, mean.shape[1:], purpose="posterior").to(mean)
        return convention.to_model(mean, logvar, noise[None])

    per_token = noisy_likelihood(
        loaded.model.flow, clean, text, draws=draws, seed=seed, progress=progress
    )
    factors = loaded.codec.factors
    likelihood = VideoLikelihood(per_token, config.noise_std, factors, config.patch_size)
    loss = likelihood.loss()
    check_noise_floor(
        float(loss.mean),
        float(loss.standard_error),
        config.noise_std,
        num_elements=draws * per_token.dims("video"),
        what="this video",
    )
    return likelihood


def check_per_token_path(path: Path) -> None:
    """Refuse a file for per-token figures before anything is computed for it."""
    if path.suffix not in PER_TOKEN_SUFFIXES:
        raise PerTokenFileError(
            f"--per-token {path}: must end in {' or '.join(PER_TOKEN_SUFFIXES)} "
            "(numbers or a picture)"
        )


def write_per_token(path: Path, likelihood: VideoLikelihood, frames: Frames, prompt: str) -> None:
    """Every token's figures as .npz, or as a .png heat map over the frames [T, H, W, 3].

    The .npz holds `loss_nats_DTHW` and `nll_nats_DTHW` (nats per token and draw, without and with
    ½ ln 2π), `token_dim` (numbers per token), `token_pixels`, `sigma` and `floor_nats_per_dim`.
    """
    check_per_token_path(path)
    with replacing(path) as partial:
        if path.suffix == ".png":
            draw_surprise(partial, likelihood, frames, prompt)
            return
        per_token = likelihood.per_token
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                loss_nats_DTHW=per_token.loss("token", "nats")[:, 0].numpy(),
                nll_nats_DTHW=per_token.nll("token", "nats")[:, 0].numpy(),
                token_dim=per_token.token_dim,
                token_pixels=likelihood.token_pixels,
                sigma=likelihood.sigma,
                floor_nats_per_dim=likelihood.floor,
            )


def draw_surprise(path: Path, likelihood: VideoLikelihood, frames: Frames, prompt: str) -> None:
    """Draw the frames of a video as a png, and under each how much its tokens surprised the model.

    A latent frame is shown by the last video frame it stands for; the heat is the loss of a token,
    nats per dimension.
    """
    from matplotlib.figure import Figure

    surprise_THW = likelihood.per_token.loss("token", "nats_per_dim")[:, 0].mean(0).numpy()
    count, rows, columns = surprise_THW.shape
    across = min(count, PICTURES_PER_ROW)
    down = 2 * math.ceil(count / across)
    height, width = frames.shape[1:3]
    cell = 1.7
    figure = Figure(
        figsize=(across * cell + 1.2, down * cell * height / width + 0.9), layout="constrained"
    )
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    # One token in fifty may leave the scale, so that a single outlier does not pale all others.
    low, high = np.quantile(surprise_THW, (0.01, 0.99))
    # Tokens cover whole cells of the codec; a picture may be a little smaller than its tokens.
    side = likelihood.token_pixels
    extent = (0, columns * side, rows * side, 0)
    for n in range(count):
        above, below = (grid[2 * (n // across) + i, n % across] for i in (0, 1))
        last = min(likelihood.factors.frames_behind(n)[-1], len(frames) - 1)
        picture = frames[last]
        above.imshow(picture)
        above.set_title(f"frame {last}", fontsize=8)
        below.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=255)
        shown = below.imshow(
            surprise_THW[n], extent=extent, cmap="inferno", alpha=0.7, vmin=low, vmax=high
        )
        for axes in (above, below):
            axes.set_xlim(0, width)
            axes.set_ylim(height, 0)
    bar = figure.colorbar(shown, ax=grid, shrink=0.8)
    bar.set_label("loss of a token, nats per dimension", fontsize=8)
    short = prompt if len(prompt) <= 100 else f"{prompt[:99]}…"
    loss = _said(likelihood.loss())
    figure.suptitle(f"{short}\nloss {loss} nats/dim, floor {likelihood.floor:.3f}", fontsize=9)
    figure.savefig(path, dpi=130, format="png")
