"""The command line: `flowreel --help`. Each command is a few lines over a stage; nothing heavy is imported before it runs."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TextIO, TypeVar

import typer

OURS = ("flow", "media", "data_prep", "training", "serving", "pipeline")
P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="flowreel",
    help="Video generation by a normalizing flow (STARFlow-V), on Ray: shards, latents, training, serving.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name or YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a recipe value: key.path=value, such as train.steps=100. Repeatable.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="Ray cluster to use; by default one is started here and ended afterwards."
    ),
]
PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="What is to be seen.")]


def user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the mistakes a user can mend into one line and exit code 2; anything else keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except Exception as error:
            # Whose class it is decides: ours are worded for users, any other is a fault and keeps its traceback.
            package = type(error).__module__.split(".")[0]
            if package not in OURS and not isinstance(error, FileNotFoundError):
                raise
            typer.echo(f"flowreel: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("flowreel: interrupted; run the same command again to go on", err=True)
            raise typer.Exit(130) from None

    return wrapped


SHORT = (
    "world.num_clips=96", "world.num_images=32", "world.clips_per_shard=32", "train.steps=40", "train.checkpoint_every=20",
    "evaluate.colour_clips=4",
)  # fmt: skip


@app.command()
@user_errors
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for everything the run makes.")
    ] = Path("runs/demo"),
    shards: Annotated[
        str | None,
        typer.Option(help="WebDataset shards of your own: a folder, a tar, or {00000..00099}.tar."),
    ] = None,
    recipe: RecipeOption = "tiny",
    clips: Annotated[
        int | None, typer.Option(min=16, help="Video clips to make (recipe: world.num_clips).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps (recipe: train.steps).")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="A minute or two to see it run; too short to learn.")
    ] = False,
    set_: SetOption = None,
    address: AddressOption = None,
) -> None:
    """From nothing to served videos in about ten minutes on two CPU cores: every stage, a report at the end."""
    from pipeline.recipes import load_recipe

    overrides = [*(SHORT if short else ()), *(set_ or [])]
    if clips is not None:
        overrides.append(f"world.num_clips={clips}")
    if steps is not None:
        overrides.append(f"train.steps={steps}")
    loaded = load_recipe(recipe, overrides)
    paths = _find_shards(shards) if shards else None
    from pipeline.stages import demo as run_demo

    run_demo(loaded, out, shards=paths, address=address)


@app.command()
@user_errors
def prepare(
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="Folder for latents, statuses and manifests; path or s3:// URI."
        ),
    ],
    shards: Annotated[
        str | None,
        typer.Option(
            help="Tars or loose files: a folder, one tar, {00000..00099}.tar, or a .txt list of these. With --only "
            "captions: where they are now, by default where they were."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="'captions': write captions for the latents that stand, where they are missing or "
            "the recipe names another captioner; latents are not touched."
        ),
    ] = None,
    recipe: RecipeOption = "tiny",
    codec: Annotated[
        str | None, typer.Option(help="'tiny', a folder, or a hub id (recipe: codec).")
    ] = None,
    set_: SetOption = None,
    address: AddressOption = None,
) -> None:
    """Video shards → latent shards: decode, filter, caption, encode. Run again, it does only what is left."""
    from pipeline.recipes import load_recipe, save_recipe

    if only not in (None, "captions"):
        raise typer.BadParameter(f"{only!r}; allowed: captions", param_hint="--only")
    if shards is None and only is None:
        raise typer.BadParameter("missing; give the shards to prepare", param_hint="--shards")
    loaded = load_recipe(recipe, [*(set_ or []), *([f"codec={codec}"] if codec else [])])
    paths = _find_shards(shards) if shards else None
    from pipeline.cluster import local_or_given
    from pipeline.console import Reporter
    from pipeline.stages import caption_again, captions_to_do, prepare_latents, shards_to_do

    if only == "captions":
        with local_or_given(loaded.cluster, address, needed=captions_to_do(loaded, paths, out) > 0):
            caption_again(loaded, paths, out, Reporter())
    else:
        left = shards_to_do(loaded, paths or [], out)
        with local_or_given(loaded.cluster, address, needed=left > 0):
            prepare_latents(loaded, paths or [], out, Reporter())
    save_recipe(loaded, out)


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
    from data_prep.moving_shapes import random_spec, render_clip
    from pipeline.console import Reporter
    from pipeline.recipes import codec_config
    from training.codec import train_codec

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
    save_recipe(loaded, out)
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
    from pipeline.single import sample_video

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
    from pipeline.single import score_file

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
    from pipeline.single import evaluate_model

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
    from pipeline.single import serve_until_interrupted

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
    from pipeline.released import import_released_weights

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


@app.command()
@user_errors
def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or YAML file.")],
    address: Annotated[
        str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")
    ],
    stage: Annotated[str, typer.Option(help="demo, prepare or train.")] = "demo",
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Stay until the job has ended.")
    ] = True,
    set_: SetOption = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="After --: arguments of the stage, such as --out DIR."),
    ] = None,
) -> None:
    """Run a recipe as a job of a Ray cluster."""
    from pipeline.recipes import load_recipe

    loaded = load_recipe(recipe, set_)
    from pipeline.cluster import submit as submit_job

    job = submit_job(loaded, address, stage=stage, arguments=arguments, wait=wait)
    typer.echo(job.logs.rstrip())
    typer.echo(f"job {job.job_id}: {job.status}")
    if job.status not in ("SUCCEEDED", "PENDING", "RUNNING"):
        raise typer.Exit(1)


@app.command()
@user_errors
def inspect(
    data: Annotated[
        str, typer.Argument(help="Latents that `flowreel prepare` wrote: folder or URI.")
    ],
    page: Annotated[
        Path | None, typer.Option(help="The HTML page; default: inspect.html in that folder.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, max=200, help="Thumbnails of kept, and as many of not kept.")
    ] = 24,
    codec: Annotated[
        str, typer.Option(help="The codec that made the latents: 'tiny', a folder, or a hub id.")
    ] = "tiny",
) -> None:
    """What a dataset holds: tables here, and a page with pictures of what was kept and what was not."""
    from pipeline.console import Reporter
    from pipeline.inspection import inspect as run_inspect
    from pipeline.recipes import TINY_CODEC

    source = str(TINY_CODEC) if codec == "tiny" else codec
    run_inspect(data, page, source, pictures, Reporter())


@app.command()
@user_errors
def export(
    data: Annotated[
        str, typer.Argument(help="Latents that `flowreel prepare` wrote: folder or URI.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the tars.")],
    shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a tar.")] = 1024,
    split: Annotated[str, typer.Option(help="all, train or held_out.")] = "all",
) -> None:
    """Latents as WebDataset tars. Killed, run it again: tars that stand are not written anew."""
    from data_prep.export import export_webdataset
    from pipeline.console import Reporter

    reporter = Reporter()
    with reporter.progress("exporting") as update:
        paths = export_webdataset(
            data,
            out,
            shard_bytes=shard_mb * 10**6,
            split=split,  # type: ignore[arg-type]
            progress=lambda done, total: update(done, total, "records"),
        )
    reporter.console.print(f"{len(paths)} tars  {out}", soft_wrap=True)


@app.command()
@user_errors
def doctor() -> None:
    """Check this machine: what Flowreel needs, what it found, what to do about it."""
    from pipeline.doctor import examine

    raise typer.Exit(0 if examine() else 1)


def _find_shards(pattern: str) -> list[str]:
    from data_prep.inputs import find_shards

    return find_shards(pattern)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our warnings are worded for users: one line, without the place in the code."""
    if category.__module__.split(".")[0] in OURS:
        typer.echo(f"flowreel: warning: {message}", err=True)
    else:
        said = warnings.formatwarning(message, category, filename, lineno, line)
        typer.echo(said, err=True, nl=False)


def main() -> Any:
    """Entry point. CPU libraries keep to the threads that each stage asks for."""
    warnings.showwarning = show_warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return app()


if __name__ == "__main__":
    sys.exit(main())
