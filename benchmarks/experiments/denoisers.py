"""Which denoiser gives back what was noised, and how steady are the videos made with it.

    python -m benchmarks.experiments.denoisers [--model FOLDER]

Held-out clips of the world are encoded, noised with the model's σ, cleaned, decoded and held
against themselves (PSNR, SSIM). Videos of as many prompts are made with each denoiser from the same
noise. The paper's table compares the same ways on real video (arXiv 2511.20462, ablation of
denoisers).

Knows the ways to denoise. Knows nothing of training.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiments.page import SEED, Subject, run, save_plot, table
from data_prep.world.judge import judge
from flow.score import tweedie
from media.frames import Frames
from pipeline.evaluation import scenes
from pipeline.evaluation.codec_quality import codec_quality, round_trip
from pipeline.evaluation.prompt_following import shares
from pipeline.evaluation.samples import BATCH, Sampling, encode, make_videos
from pipeline.evaluation.steadiness import steadiness
from serving.loading import LoadedModel

CLIPS = 48
WAYS = {
    "none": "the decoder alone",
    "score": "score (Tweedie)",
    "learned": "learned (flow-score matching)",
}


@torch.no_grad()
def cleaned(loaded: LoadedModel, way: str, x_noisy: Tensor, text_BJE: Tensor) -> Tensor:
    """Noisy latents [B, T, C, h, w] denoised in one of the `WAYS`."""
    if way == "none":
        return x_noisy
    if way == "score":
        return tweedie(loaded.model.flow, x_noisy, text_BJE)
    assert loaded.model.denoiser is not None, "a model without a denoiser"
    return loaded.model.denoise(x_noisy, loaded.model.denoiser(x_noisy, text_BJE))


def given_back(loaded: LoadedModel, way: str, real_NTHWC: Frames, texts: tuple[str, ...]) -> Frames:
    """Real clips after encoding, noise, denoising and decoding."""
    codec, sigma = loaded.codec, loaded.model.config.noise_std
    assert codec is not None
    generator, back = torch.Generator().manual_seed(SEED), []
    for low in range(0, len(real_NTHWC), BATCH):
        mean, logvar = codec.encode(torch.from_numpy(real_NTHWC[low : low + BATCH]))
        x = codec.convention.to_model(mean, logvar, torch.zeros_like(mean))
        x_noisy = x + sigma * torch.randn(x.shape, generator=generator)
        text_BJE = encode(loaded, texts[low : low + BATCH], real_NTHWC.shape[1]).text_BJE
        back.append(codec.decode(cleaned(loaded, way, x_noisy, text_BJE)).cpu().numpy())
    return np.concatenate(back)


def experiment(subject: Subject, pages: Path) -> str:
    """The table and the plot."""
    from matplotlib import pyplot

    loaded, kinds = subject.loaded, subject.recipe.world.kinds
    asked = scenes.asked(CLIPS, "seen", SEED, kinds, loaded.facts)
    assert loaded.codec is not None
    real = asked.real_NTHWC
    ceiling = codec_quality(real, round_trip(loaded.codec, real))
    calm = steadiness(real)
    rows = [
        ["the codec, no noise", f"{ceiling.psnr_db:.2f}", f"{ceiling.ssim:.3f}", "", "", "", ""],
        ["real clips", "", "", f"{calm.flicker:.2f}", f"{calm.warp_error:.1f}", "", ""],
    ]
    by_frame = {"the codec, no noise": ceiling.psnr_db_by_frame}
    for way, words in WAYS.items():
        quality = codec_quality(real, given_back(loaded, way, real, asked.texts))
        by_frame[words] = quality.psnr_db_by_frame
        chosen = dataclasses.replace(
            loaded, sampling=loaded.sampling.model_copy(update={"denoiser": way})
        )
        begun = time.monotonic()
        made = make_videos(chosen, asked.texts, Sampling(subject.guidance, seed=SEED))
        took = (time.monotonic() - begun) / CLIPS
        steady = steadiness(made)
        read = shares(asked.prompts, [judge(clip, fps=loaded.facts.fps) for clip in made])
        rows.append(
            [
                words, f"{quality.psnr_db:.2f}", f"{quality.ssim:.3f}", f"{steady.flicker:.2f}",
                f"{steady.warp_error:.1f}", f"{read['shape'].value:.2f}", f"{took:.2f}",
            ]
        )  # fmt: skip
    columns = [
        "denoiser", "PSNR, dB", "SSIM", "flicker of its videos", "warp error", "shapes read right",
        "seconds a video",
    ]  # fmt: skip
    figure, axis = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for words, values in by_frame.items():
        axis.plot(range(1, len(values) + 1), values, label=words)
    axis.set_xlabel("frame")
    axis.set_ylabel("PSNR, dB")
    axis.legend(fontsize=8)
    sigma = loaded.model.config.noise_std
    about = f"{CLIPS} held-out clips, {CLIPS} prompts, σ {sigma:g}, guidance {subject.guidance:g}."
    return f"{table(columns, rows)}\n\n{about}\n\n{save_plot(figure, 'denoisers', pages)}"


if __name__ == "__main__":
    run(experiment, "denoisers", __doc__ or "")
