"""What the demo's report shows beside the videos that its model made, and in which order.

Knows the model that ships and the report's samples. Knows nothing of Ray.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.console import Reporter
from pipeline.make_video import VideoOptions, sample_video
from pipeline.recipes import Recipe, load_recipe
from pipeline.report import Sample
from pipeline.shipped import recipe_beside, shipped_model


def by_shipped_weights(prompts: list[str], recipe: Recipe, out: Path) -> list[Sample]:
    """What the weights that ship make of the same prompts and seeds: what longer training gives."""
    folder = shipped_model()
    theirs, frames = load_recipe(recipe_beside(folder)), recipe.prepare.bucket.num_frames
    quiet = Reporter(console=Console(quiet=True))
    made = []
    for seed, prompt in enumerate(prompts):
        path = out / f"shipped-weights-{seed:03d}.mp4"
        options = VideoOptions(prompt, frames, seed)
        video = sample_video(theirs, folder, options, path, quiet)
        made.append(Sample(prompt, "the weights that ship", path, video))
    return made


def beside_each_other(generated: list[Sample], others: list[Sample]) -> list[Sample]:
    """The samples in the report's order: real clips follow the video of the same prompt."""
    ordered = []
    for sample in generated:
        ordered.append(sample)
        if sample.kind == "text to video":
            ordered += [other for other in others if other.prompt == sample.prompt]
    return ordered
