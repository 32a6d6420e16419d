"""Commands around a model: train it, sample, ask how likely a video is, serve, import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import arguments
from pipeline.cli.options import (
    AddressOption,
    DataOption,
    GuidanceOption,
    JsonOption,
    ModelArgument,
    ModelRecipeOption,
    OptionalModelArgument,
    PromptOption,
    RecipeOption,
    ScheduleOption,
    SetOption,
    command,
    reporter,
)


@command(
    resumes=True,
    examples=(
        "flowreel train --data /data/latents --out runs/mine --set train.steps=2000",
        "flowreel train --data /data/latents --out runs/mine --watch",
    ),
)
def train(
    data: DataOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for checkpoints, model and MLflow store.")
    ],
    recipe: RecipeOption = "tiny",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; default: the recipe's train.steps.")
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Model folder, or another run's folder or checkpoint, whose weights a fresh run "
            "begins with; a smaller model is grown.",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Losses, speed, memory and time left instead of one line, where there is a "
            "terminal; `flowreel watch` shows the same from another one.",
        ),
    ] = False,
    set_: SetOption = None,
    address: AddressOption = None,
    json_: JsonOption = False,
) -> None:
    """Latent shards → checkpoints and a model folder.

    Killed, run it again: it goes on from the last checkpoint.
    """
    arguments.latents(data)
    arguments.output_folder(out)
    arguments.cluster_address(address)
    from pipeline.recipes import load_recipe, save_recipe

    overrides = [f"train.steps={steps}"] if steps else []
    if start_from is not None:
        overrides.append(f"train.start_from={json.dumps(start_from)}")
    loaded = load_recipe(recipe, [*(set_ or []), *overrides])
    if steps and loaded.stages:
        raise arguments.ArgumentError(
            f"--steps {steps}: recipe {loaded.name} has stages, and each says its own; give "
            "--set stages=[] for a run of one piece, or change them in a recipe of yours"
        )
    from pipeline.cluster import local_or_given
    from pipeline.stages import train as run_train
    from pipeline.stages import training_to_do

    said = reporter(json_)
    with local_or_given(loaded.cluster, address, needed=training_to_do(loaded, data, out)):
        result = run_train(loaded, data, out, said, watch=watch)
    save_recipe(loaded, out, bucket_as_given=True)
    said.outcome(f"model  {result.model_dir}")
    if result.adapter_dir is not None:
        said.outcome(f"adapter  {result.adapter_dir}")
    said.document(result)


@command(
    examples=(
        "flowreel sample --prompt 'A large red circle moves left.'",
        "flowreel sample runs/demo/train/model --prompt 'A red circle moves left.'",
        "flowreel sample runs/demo/train/model -p 'A red circle' --image first.png --certificate",
    )
)
def sample(
    prompt: PromptOption,
    model: OptionalModelArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The .mp4, or .png of one frame, to write; default: sample.mp4, or sample.png "
            "with an image model.",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Video frames, 4k+1 with the codec's factor 4; default: the trained length."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Noise seed; the same seed gives the same video.")
    ] = 0,
    guidance: GuidanceOption = None,
    schedule: ScheduleOption = "jacobi",
    certificate: Annotated[
        bool, typer.Option("--certificate", help="Prove how exact the sample is, by one more pass.")
    ] = False,
    image: Annotated[
        Path | None, typer.Option(help="First frame to continue: png, jpg or webp.")
    ] = None,
    denoiser: Annotated[
        str | None,
        typer.Option(
            help="learned, score (forward and backward through the flow, whole clip) or none; "
            "default: the recipe's sampler.denoiser.",
            autocompletion=arguments.complete_denoiser,
        ),
    ] = None,
    recipe: ModelRecipeOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """One video in this process, frame for frame what `flowreel serve` would send."""
    from pipeline.shipped import recipe_beside

    folder = arguments.model_or_shipped(model)
    if out is not None:
        arguments.output_file(out, suffixes=arguments.VIDEO_SUFFIXES)
    if image is not None:
        arguments.input_file(image, "a png, jpg or webp")
    arguments.one_of("--schedule", schedule, arguments.schedules())
    if denoiser is not None:
        arguments.one_of("--denoiser", denoiser, arguments.denoisers())
    from pipeline.recipes import load_recipe

    chosen = [f"sampler.denoiser={denoiser}"] if denoiser else []
    loaded = load_recipe(recipe or recipe_beside(folder), [*(set_ or []), *chosen])
    from pipeline.make_video import VideoOptions, sample_video

    options = VideoOptions(prompt, frames, seed, guidance, schedule, image, certificate)
    sample_video(loaded, folder, options, out, reporter(json_))


def likelihood(
    model: ModelArgument,
    video: Annotated[
        Path,
        typer.Argument(
            metavar="VIDEO", help="mp4; its beginning is cut to what the model was trained on."
        ),
    ],
    prompt: PromptOption,
    draws: Annotated[int, typer.Option(min=2, max=1024, help="Seeded noise draws.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    per_frame: Annotated[
        bool, typer.Option("--per-frame/--no-per-frame", help="A table of the latent frames.")
    ] = True,
    per_token: Annotated[
        Path | None,
        typer.Option(
            help="Write every token: .png, a heat map over the frames, or .npz, numbers; "
            "default: not."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """How likely the model finds a video, as a whole and frame by frame (also called `score`).

    Prints the negative log-likelihood and the training loss, in nats and bits per dimension: mean
    ± standard error over seeded noise draws.
    """
    folder = arguments.model_folder(model)
    arguments.input_file(video, "a video")
    if per_token is not None:
        arguments.output_file(per_token, option="--per-token", suffixes=(".npz", ".png"))
    from pipeline.video_likelihood import likelihood_of_file

    likelihood_of_file(
        folder,
        video,
        prompt,
        draws=draws,
        seed=seed,
        per_frame=per_frame,
        per_token=per_token,
        reporter=reporter(json_),
    )


command(
    examples=(
        "flowreel likelihood runs/demo/train/model video.mp4 --prompt 'A red circle'",
        "flowreel likelihood runs/demo/train/model video.mp4 -p 'A red circle' --per-token a.png",
    )
)(likelihood)
command("score", hidden=True)(likelihood)


@command(
    examples=(
        "flowreel serve",
        "flowreel serve runs/demo/train/model --port 8000",
        "curl 127.0.0.1:8000/v1/videos -H 'content-type: application/json' "
        '-d \'{"prompt": "A red circle moves left"}\'',
    )
)
def serve(
    model: OptionalModelArgument = None,
    host: Annotated[
        str | None,
        typer.Option(help="Interface to bind; default: the recipe's serve.host, else 127.0.0.1."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="TCP port, 0 for a free one; default: the recipe's serve.port, else 8000.",
        ),
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Where jobs and videos are kept.")] = Path(
        "runs/served"
    ),
    recipe: ModelRecipeOption = None,
    set_: SetOption = None,
    address: AddressOption = None,
    json_: JsonOption = False,
) -> None:
    """Model folder → HTTP endpoint (OpenAI Videos dialect), until Ctrl-C."""
    from pipeline.shipped import recipe_beside

    folder = arguments.model_or_shipped(model)
    arguments.output_folder(data_dir, option="--data-dir")
    arguments.cluster_address(address)
    from pipeline.recipes import load_recipe

    loaded = load_recipe(recipe or recipe_beside(folder), set_)
    from pipeline.run_service import serve_until_stopped

    serve_until_stopped(
        loaded,
        folder,
        host=host,
        port=port,
        data_dir=data_dir,
        address=address,
        reporter=reporter(json_),
    )


@command(
    "import-weights",
    examples=["flowreel import-weights X.pth --config X.yaml --out DIR --dtype bf16"],
)
def import_weights(
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="WEIGHTS", help="Released .pth; nothing in it is run (weights_only=True)."
        ),
    ],
    config: Annotated[Path, typer.Option(help="Its YAML: a list of `arguments`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write.")],
    text_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Width of a text token; default: read from the weights."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="bf16, fp32, or keep: as the checkpoint has them.",
            autocompletion=lambda: list(arguments.DTYPES),
        ),
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
    json_: JsonOption = False,
) -> None:
    """A released checkpoint → a model folder: sharded safetensors and config.json.

    It takes little memory, and what is written is there whole or not at all.
    """
    arguments.input_file(weights, "the released .pth")
    arguments.input_file(config, "the released YAML")
    arguments.one_of("--dtype", dtype, arguments.DTYPES)
    arguments.output_folder(out)
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
        reporter=reporter(json_),
    )


@command(
    "train-codec",
    examples=["flowreel train-codec --out runs/codec --set learning_rate=1e-3"],
)
def train_codec_command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for config.json, weights and quality.json.")
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps on clips; default 4600 (80 minutes of a core).")
    ] = None,
    image_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps on single frames before; default 600.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Codec folder whose training goes on; default: a new codec."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    fps: Annotated[
        list[float] | None,
        typer.Option(
            min=1,
            help="Frames per second of the training clips; repeatable: scenes take turns. "
            "Default: 8 and 16.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or mps; auto takes a GPU where there is one.")
    ] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, such as learning_rate=1e-3; repeatable. "
            "`flowreel settings train-codec` lists them.",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Train a small codec (×8 in space, ×4 in time) on procedural video.

    Prints its PSNR in dB on held-out clips. A run that was killed goes on where it was.
    """
    arguments.output_folder(out)
    if start is not None:
        arguments.input_file(start / "config.json", "the folder of a codec")
    from pipeline.recipes import codec_config

    chosen = {"steps": steps, "image_steps": image_steps, "seed": seed}
    config = codec_config(
        [*(f"{k}={v}" for k, v in chosen.items() if v is not None), *(set_ or [])]
    )
    from data_prep.world.draw import random_scene
    from data_prep.world.render import render_clip
    from flow.device import device_of
    from training.codec.train import train_codec

    said = reporter(json_)
    chosen_device = str(device_of(device))
    rates = tuple(fps or (8.0, 16.0))
    with said.progress("training codec") as update:
        quality = train_codec(
            config,
            lambda seed, count: render_clip(random_scene(seed), count, rates[seed % len(rates)]),
            out,
            progress=lambda m: update(int(m["step"]), int(m["steps"]), f"{m['psnr_db']:.1f} dB"),
            start=start,
            device=chosen_device,
        )
    said.outcome(f"{out}: {quality['psnr_db']:.2f} dB on held-out clips")
    said.document({"codec": out, **quality})
