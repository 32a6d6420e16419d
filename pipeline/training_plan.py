"""`flowreel plan`: what training a recipe would take on some GPUs, and what would make it fit.

Turns a recipe into the kinds of steps that it has, and shows what `training.plan` makes of them.
Starts nothing and reads no data.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.latents.records import Bucket
from flow.codec_factors import SD_FACTORS, WAN_FACTORS, CodecFactors, read_factors
from pipeline.console import Reporter, duration, size
from pipeline.recipes import Recipe
from training.data.batch_sampler import Mode, batch_of
from training.data.latents import is_of
from training.footprint import StepShape
from training.hardware import USABLE, Hardware
from training.plan import Job, Plan, make_plan
from training.stage import Stage

TFLOP = 1e12
KINDS = {
    "weights": "weights, fp32",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "averaged": "averaged weights",
    "gathered": "gathered from other GPUs",
    "casts": "bf16 copies of weights",
    "activations": "activations",
    "computed_again": "one layer, computed again",
    "peak": "at the peak",
}
"""What the plan calls the kinds of memory; not all are there at once."""


def plan_training(recipe: Recipe, hardware: Hardware) -> dict[str, Plan]:
    """What training the recipe on the hardware takes, by stage; one of its name without stages.

    Raises:
        PlanError: a batch that the GPUs cannot share equally.
        BatchSamplerError: a budget of tokens that is too small for a clip.
    """
    stages = recipe.curriculum or (Stage(recipe.name, recipe.model, recipe.train),)
    return {stage.name: make_plan(job_of(recipe, stage), hardware) for stage in stages}


def job_of(recipe: Recipe, stage: Stage) -> Job:
    """A stage's model, settings and kinds of steps: one for every length and size of clips."""
    bucket, batches, flow = recipe.prepare.bucket, stage.train.batches, stage.flow
    factors = _factors(recipe)
    sizes = bucket.all_sizes(factors.space)
    if batches.resolution is not None:
        sizes = [s for s in sizes if is_of(Bucket(1, *s), batches.resolution)] or sizes

    def shape(mode: Mode, frames: int, size: tuple[int, int]) -> StepShape:
        latent_frames, grid = factors.latent_frames(frames), factors.grid(*size)
        tokens = latent_frames * (grid[0] // flow.patch_size) * (grid[1] // flow.patch_size)
        batch = batch_of(batches, mode, Bucket(frames, *size), tokens)
        return StepShape(latent_frames, *grid, batch)

    lengths = {min(n, batches.frames or n) for n in bucket.lengths}
    largest = max(sizes, key=lambda size: size[0] * size[1])
    videos = {shape("video", n, size) for n in lengths if n > 1 for size in sizes}
    only_images = not flow.video or batches.image_ratio == 1
    return Job(
        flow,
        stage.train,
        () if only_images else tuple(sorted(videos)),
        shape("image", 1, largest) if only_images or batches.image_ratio > 0 else None,
        recipe.prepare.keep_logvar,
    )


def _factors(recipe: Recipe) -> CodecFactors:
    """The codec's; of one on a hub, which is not asked, those of the released models' codecs."""
    if Path(recipe.codec_source).is_dir():
        return read_factors(recipe.codec_source)
    return WAN_FACTORS if recipe.model.video else SD_FACTORS


def show_plan(plan: Plan, said: Reporter) -> None:
    """The plan as a person reads it."""
    gpu, shape = plan.hardware.gpu, plan.largest
    said.outcome(
        f"{plan.parameters / 1e6:,.1f} million parameters, {plan.strategy} on {plan.workers} "
        f"{plan.hardware.name}; the largest step has {shape.batch} x {shape.frames} latent frames "
        f"of {shape.rows} x {shape.columns}, {plan.micro_batch} at once on a GPU"
    )
    rows = [
        [words, size(round(getattr(plan.memory, kind)))]
        for kind, words in KINDS.items()
        if getattr(plan.memory, kind)
    ]
    usable = size(round(USABLE * gpu.memory_bytes))
    rows.append([f"there is, of {size(round(gpu.memory_bytes))}", usable])
    said.table("memory of a GPU", ["kind", "bytes"], rows)
    said.outcome(
        f"activations without checkpointing {size(round(plan.without_checkpointing))}, "
        f"with full {size(round(plan.with_full))}"
    )
    said.outcome(
        f"a step {plan.step_flops / TFLOP:,.3g} TFLOP and {plan.step_s:.3g} s, the run "
        f"{plan.tokens:.3g} tokens and {duration(plan.hours * 3600)} at {plan.mfu:.0%} of "
        f"{gpu.peak_flops / TFLOP:.0f} TFLOP/s, which is assumed"
    )
    each = plan.latent_bytes
    said.outcome(
        f"latents {size(each)} a clip, {size(1000 * each)} a thousand clips, read at "
        f"{size(round(each * shape.batch / plan.step_s))} a second"
    )
    if plan.fits:
        said.outcome("It fits.")
    for words in plan.advice:
        said.outcome(f"It does not fit. This would: {words}")
