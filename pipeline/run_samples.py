"""Videos of a trained model at fixed seeds, and a contact sheet: what a run leaves to look at.

Captions are the first of the held-out clips, seeds count up from 0, so that two runs on the same
data show the same prompts from the same noise. Knows nothing of Ray or MLflow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.latents.dataset import LatentDataset
from flowreel.files import write_whole
from media.write import encode_mp4, encode_png
from pipeline.evaluation.samples import Sampling, make_videos
from pipeline.recipes import Recipe
from pipeline.report import Sample, contact_sheet
from serving.loading import load
from training.held_out import evaluation_ids
from training.run import Look

SHEET_NAME = "contact_sheet.png"


def samples_of(recipe: Recipe, latents: str | Path) -> Look | None:
    """What makes a recipe's samples of a model folder; None where it wants none.

    Its files are `000.mp4` and so on (`.png` of an image model), and the contact sheet.
    """
    count = recipe.train.tracking.samples
    if count == 0 or not recipe.train.tracking.enabled:
        return None

    def look(model_dir: Path, out: Path) -> Sequence[Path]:
        return make_samples(recipe, model_dir, first_captions(latents, count), out)

    return look


def first_captions(latents: str | Path, count: int) -> list[str]:
    """Captions of the first held-out clips; of clips trained on where none is held out."""
    splits = (LatentDataset(latents, "held_out"), LatentDataset(latents, "train"))
    dataset = next((split for split in splits if split.buckets), splits[-1])
    _bucket, ids = evaluation_ids(dataset, count)
    return [synthetic or original for original, synthetic in map(dataset.captions, ids)]


def make_samples(
    recipe: Recipe, model_dir: Path, prompts: Sequence[str], out: Path
) -> Sequence[Path]:
    """A video for each prompt in `out`, with the recipe's sampler; returns all files."""
    torch.set_num_threads(recipe.serve.resources.threads)
    loaded = load(model_dir, sampling=recipe.sampler)
    videos = make_videos(loaded, prompts, Sampling(recipe.serve.limits.default_guidance))
    samples = []
    for seed, (prompt, frames) in enumerate(zip(prompts, videos, strict=True)):
        is_video = len(frames) > 1
        path = out / f"{seed:03d}.{'mp4' if is_video else 'png'}"
        data = encode_mp4(frames, loaded.facts.fps) if is_video else encode_png(frames[0])
        write_whole(path, data)
        samples.append(Sample(prompt, f"seed {seed}", path, frames))
    picture = io.BytesIO()
    contact_sheet(samples).save(picture, "PNG")
    write_whole(out / SHEET_NAME, picture.getvalue())
    return [*(sample.path for sample in samples), out / SHEET_NAME]
