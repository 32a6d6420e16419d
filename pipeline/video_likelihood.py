"""How likely a model finds one video: the figures of `flowreel score`, and a picture of which parts surprise it.

Frames and a prompt in, likelihoods over seeded noise draws out. Knows nothing of files other than the ones it
writes, and nothing of Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flow.likelihood import (
    Estimate,
    Likelihood,
    check_noise_floor,
    draw_noise,
    noise_floor,
    noisy_likelihood,
    over_draws,
)
from flowreel.errors import FlowreelError
from serving.session import LoadedModel, load, prompt_text

PER_TOKEN_SUFFIXES = (".npz", ".png")
PICTURES_PER_ROW = 7


class ScoreOutputError(FlowreelError, ValueError):
    """A place for per-token figures that cannot be written as asked."""


@dataclass(frozen=True)
class VideoScore:
    """Exact log-density of one video's σ-noised latents (`flow.likelihood` defines nll and loss).

    per_token: a likelihood [D, 1, T, H, W] over D noise draws; sigma: the noise; token_pixels: pixels on the side of what
    one token sees.
    """

    per_token: Likelihood
    sigma: float
    token_pixels: int

    @property
    def floor(self) -> float:
        """½ + ln σ: the least mean loss, nats per dimension."""
        return noise_floor(self.sigma)

    @property
    def draws(self) -> int:
        return len(self.per_token.loss_BTHW)

    def loss(self) -> Estimate:
        """Of the video, nats per dimension, ½ ln 2π left out; fp64 scalars."""
        return over_draws(self.per_token.loss("video", "nats_per_dim")[:, 0])

    def lines(self) -> list[str]:
        """The figures of the whole video, as a person reads them."""
        score = self.per_token

        def both(name: str) -> str:
            value = score.nll if name == "nll" else score.loss
            nats, bits = (
                _said(over_draws(value("video", unit)[:, 0]))
                for unit in ("nats_per_dim", "bits_per_dim")
            )
            return f"{nats} nats/dim   {bits} bits/dim"

        total = over_draws(score.log_prob("video")[:, 0])
        return [
            f"nll    {both('nll')}   negative log-likelihood, ½ ln 2π per dimension included",
            f"loss   {both('loss')}   the same without ½ ln 2π, as in training",
            f"floor  {self.floor:.4f} nats/dim: ½ + ln σ, no model's mean loss is below it",
            f"log p(video) = {_said(total, 1)} nats over {score.dims('video')} dimensions; "
            f"mean ± standard error over {self.draws} noise draws",
        ]

    def frame_rows(self) -> list[list[str]]:
        """Latent frame, the video frames it holds, nll in nats and bits per dimension, loss in nats per dimension."""
        score = self.per_token
        columns = [
            over_draws(value[:, 0])
            for value in (
                score.nll("frame", "nats_per_dim"),
                score.nll("frame", "bits_per_dim"),
                score.loss("frame", "nats_per_dim"),
            )
        ]
        rows = []
        for n in range(score.loss_BTHW.shape[-3]):
            said = [_said(Estimate(c.mean[n], c.standard_error[n])) for c in columns]
            rows.append([str(n), "0" if n == 0 else f"{4 * n - 3}-{4 * n}", *said])
        return rows


def _said(value: Estimate, digits: int = 4) -> str:
    return f"{float(value.mean):.{digits}f} ± {float(value.standard_error):.{digits}f}"


def score_video(
    model: LoadedModel | Path,
    frames: np.ndarray,
    prompt: str,
    *,
    draws: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> VideoScore:
    """How likely a model finds a video given a prompt.

    Args:
        model: a loaded model, or a model folder.
        frames: uint8 [T, H, W, 3] at the model's size and frame rate, T = 4k+1.
        draws: seeded draws of the σ-noise that the flow's latents carry (and of the codec's posterior, where the
            model was trained on samples of it).

    Warns:
        NoiseFloorWarning: the mean loss is clearly under ½ + ln σ.
    """
    loaded = model if isinstance(model, LoadedModel) else load(model)
    assert loaded.codec is not None
    assert loaded.text_encoder is not None
    mean, logvar = loaded.codec.encode(torch.from_numpy(frames)[None])
    text = loaded.text_encoder.encode([prompt_text(prompt, loaded)]).to(mean.device)
    convention, config = loaded.codec.convention, loaded.model.config

    def clean(draw: int) -> Tensor:
        noise = draw_noise(seed, draw, mean.shape[1:], purpose="posterior").to(mean)
        return convention.to_model(mean, logvar, noise[None])

    scored = noisy_likelihood(
        loaded.model.flow, clean, text, draws=draws, seed=seed, progress=progress
    )
    pixels = config.patch_size * loaded.codec.factors.space
    result = VideoScore(scored, config.noise_std, pixels)
    loss = result.loss()
    check_noise_floor(
        float(loss.mean),
        float(loss.standard_error),
        config.noise_std,
        num_elements=draws * scored.dims("video"),
        what="this video",
    )
    return result


def check_per_token_path(path: Path) -> None:
    """Refuse a file for per-token figures before anything is computed for it."""
    if path.suffix not in PER_TOKEN_SUFFIXES:
        raise ScoreOutputError(
            f"--per-token {path}: must end in {' or '.join(PER_TOKEN_SUFFIXES)} (numbers or a picture)"
        )


def write_per_token(path: Path, score: VideoScore, frames: np.ndarray, prompt: str) -> None:
    """Every token's figures as .npz, or as a .png heat map over the frames [T, H, W, 3].

    The .npz holds `loss_nats_DTHW` and `nll_nats_DTHW` (nats per token and draw, without and with ½ ln 2π), `token_dim`
    (numbers per token), `token_pixels`, `sigma` and `floor_nats_per_dim`.
    """
    check_per_token_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        draw_surprise(path, score, frames, prompt)
        return
    per_token = score.per_token
    np.savez_compressed(
        path,
        loss_nats_DTHW=per_token.loss("token", "nats")[:, 0].numpy(),
        nll_nats_DTHW=per_token.nll("token", "nats")[:, 0].numpy(),
        token_dim=per_token.token_dim,
        token_pixels=score.token_pixels,
        sigma=score.sigma,
        floor_nats_per_dim=score.floor,
    )


def draw_surprise(path: Path, score: VideoScore, frames: np.ndarray, prompt: str) -> None:
    """Each latent frame's last video frame, and under it what surprised the model in it: loss per token, nats/dim."""
    from matplotlib.figure import Figure

    surprise_THW = score.per_token.loss("token", "nats_per_dim")[:, 0].mean(0).numpy()
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
    extent = (0, columns * score.token_pixels, rows * score.token_pixels, 0)
    for n in range(count):
        above, below = (grid[2 * (n // across) + i, n % across] for i in (0, 1))
        picture = frames[min(4 * n, len(frames) - 1)]
        above.imshow(picture)
        above.set_title(f"frame {4 * n}", fontsize=8)
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
    loss = score.loss()
    figure.suptitle(f"{short}\nloss {_said(loss)} nats/dim, floor {score.floor:.3f}", fontsize=9)
    figure.savefig(path, dpi=130)
