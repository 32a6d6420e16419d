"""Commands around a model: train it, sample, score, evaluate, serve, import released weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import (
    AddressOption,
    PromptOption,
    RecipeOption,
    SetOption,
    app,
    user_errors,
)


@app.command("train-codec")
@user_errors
def train_codec_command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for config.json, weights and quality.json.")
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps on clips; default 3600 (20 minutes on a core).")
    ] = None,
    image_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps on single frames before; default 900.")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Codec folder whose training goes on.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    fps: Annotated[
        float, typer.Option(min=1, help="Frames per second of the training clips.")
    ] = 8.0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting: key=value, such as learning_rate=1e-3."),
    ] = None,
) -> None:
    """Train a small codec (x16 in space, x4 in time) on procedural video; prints its held-out PSNR in dB."""
    from data_prep.sources.moving_shapes import random_spec, render_clip
    from pipeline.console import Reporter
    from pipeline.recipes import codec_config
    from training.codec_training import train_codec

    chosen = {"steps": steps, "image_steps": image_steps, "seed": seed}
    config = codec_config(
        [*(f"{k}={v}" for k, v in chosen.items() if v is not None), *(set_ or [])]
    )
    reporter = Reporter()
    with reporter.progress("training codec") as update:
        quality = train_codec(
            config,
            lambda scene, count: render_clip(random_spec(scene), count, fps),
            out,
            progress=lambda m: update(int(m["step"]), int(m["steps"]), f"{m['psnr_db']:.1f} dB"),
            start=start,
        )
    reporter.console.print(f"{out}: {quality['psnr_db']:.2f} dB on held-out clips")


@app.command()
@user_errors
def train(
    data: Annotated[
        str,
        typer.Option(help="Folder of latents that `flowreel prepare` wrote; path or s3:// URI."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for checkpoints, model and MLflow store.")
    ],
    recipe: RecipeOption = "tiny",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps (recipe: train.steps).")
    ] = None,
    set_: SetOption = None,
    address: AddressOption = None,
) -> None:
    """Latent shards → checkpoints and a model folder. Killed, run it again: it goes on from the last checkpoint."""
    from pipeline.recipes import load_recipe, save_recipe

    loaded = load_recipe(recipe, [*(set_ or []), *([f"train.steps={steps}"] if steps else [])])
    from pipeline.cluster import local_or_given
    from pipeline.console import Reporter
    from pipeline.stages import train as run_train
    from pipeline.stages import training_to_do

    reporter = Reporter()
    with local_or_given(loaded.cluster, address, needed=training_to_do(loaded, data, out)):
        result = run_train(loaded, data, out, reporter)
    save_recipe(loaded, out, bucket_as_given=True)
    reporter.console.print(f"model  {result.model_dir}")


@app.command()
@user_errors
def sample(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    prompt: PromptOption,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The mp4, or png of one frame, to write; default: sample.mp4."
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Video frames, 4k+1; default: the trained length.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Noise seed; the same seed gives the same video.")
    ] = 0,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance weight; 0 is none, default the recipe's.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="jacobi (as served), sliding (fewer evaluations) or sequential.")
    ] = "jacobi",
    certificate: Annotated[
        bool, typer.Option("--certificate", help="Prove how exact the sample is, by one more pass.")
    ] = False,
    image: Annotated[
        Path | None, typer.Option(help="First frame to continue: png, jpg or webp.")
    ] = None,
    denoiser: Annotated[
        str | None,
        typer.Option(
            help="learned, score (forward and backward through the flow, whole clip) or none; default the recipe's."
        ),
    ] = None,
    recipe: RecipeOption = "tiny",
    set_: SetOption = None,
) -> None:
    """One video in this process, frame for frame what `flowreel serve` would send."""
    from pipeline.recipes import load_recipe

    chosen = [f"sampler.denoiser={denoiser}"] if denoiser else []
    loaded = load_recipe(recipe, [*(set_ or []), *chosen])
    from pipeline.make_video import sample_video

    sample_video(
        loaded,
        model,
        prompt,
        out,
        num_frames=frames,
        seed=seed,
        guidance=guidance,
        schedule=schedule,
        image=image,
        certify=certificate,
    )


@app.command()
@user_errors
def score(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    video: Annotated[
        Path, typer.Argument(help="mp4, cut and resized to what the model was trained on.")
    ],
    prompt: PromptOption,
    draws: Annotated[int, typer.Option(min=2, max=1024, help="Seeded noise draws.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    per_frame: Annotated[
        bool, typer.Option("--per-frame/--no-per-frame", help="A table of the latent frames.")
    ] = True,
    per_token: Annotated[
        Path | None,
        typer.Option(help="Write every token: .png, a heat map over the frames, or .npz, numbers."),
    ] = None,
) -> None:
    """How likely the model finds a video: negative log-likelihood and training loss, in nats and bits per dimension, of
    the video and of each frame; mean ± standard error over seeded noise draws.
    """
    from pipeline.make_video import score_file

    score_file(
        model, video, prompt, draws=draws, seed=seed, per_frame=per_frame, per_token=per_token
    )


@app.command()
@user_errors
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    data: Annotated[Path, typer.Option(help="Folder of latents that `flowreel prepare` wrote.")],
    draws: Annotated[int, typer.Option(min=2, max=1024, help="Noise draws per clip.")] = 4,
) -> None:
    """Held-out loss in nats per dimension with true and with shuffled captions, beside a Gaussian and the noise floor."""
    from pipeline.make_video import evaluate_model

    evaluate_model(model, data, draws=draws)


@app.command()
@user_errors
def serve(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    host: Annotated[str | None, typer.Option(help="Interface to bind; default 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="TCP port, 0 for a free one; default 8000.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Where jobs and videos are kept.")] = Path(
        "runs/served"
    ),
    recipe: RecipeOption = "tiny",
    set_: SetOption = None,
    address: AddressOption = None,
) -> None:
    """Model folder → HTTP endpoint (OpenAI Videos dialect), until Ctrl-C."""
    from pipeline.recipes import load_recipe

    loaded = load_recipe(recipe, set_)
    from pipeline.make_video import serve_until_interrupted

    serve_until_interrupted(
        loaded,
        model,
        host=host or loaded.serve.host,
        port=8000 if port is None else port,
        data_dir=data_dir,
        address=address,
    )


@app.command("import-weights")
@user_errors
def import_weights(
    weights: Annotated[Path, typer.Argument(help="Released .pth (read with weights_only=True).")],
    config: Annotated[Path, typer.Option(help="Its YAML: a list of `arguments`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write.")],
    text_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Width of a text token; default: read from the weights."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bf16, fp32, or keep: as the checkpoint has them.")
    ] = "keep",
    codec: Annotated[
        str | None, typer.Option(help="Codec's folder or hub id; default: what the YAML names.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="T5's folder or hub id, or 'hashed'; default: what the YAML names."),
    ] = None,
    aspect: Annotated[
        str | None,
        typer.Option(help="WIDTH:HEIGHT to sample at; default 16:9, or 1:1 if never trained."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model folder at --out.")
    ] = False,
) -> None:
    """A released checkpoint → sharded safetensors + config.json, in little memory; what is there is whole or not at all."""
    from pipeline.import_released import import_released_weights

    import_released_weights(
        weights,
        config,
        out,
        text_dim=text_dim,
        dtype=dtype,
        codec=codec,
        text=text,
        aspect=aspect,
        overwrite=overwrite,
    )
