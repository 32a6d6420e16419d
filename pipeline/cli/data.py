"""Commands around a dataset of latents: prepare, look, inspect, export, merge-latents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import arguments
from pipeline.cli.options import (
    AddressOption,
    DataArgument,
    JsonOption,
    RecipeOption,
    SetOption,
    command,
    reporter,
)

_ONLY = ("captions", "text")


@command(
    resumes=True,
    examples=(
        "flowreel prepare --shards /data/panda --out /data/latents",
        "flowreel prepare --shards s3://b/{00000..00099}.tar --out s3://b/latents",
        "flowreel prepare --shards 'https://host/panda/{00000..00099}.tar' --out /data/latents",
        "flowreel prepare --shards hf://datasets/OWNER/NAME/train --out /data/latents",
        "flowreel prepare --only captions --out /data/latents "
        "--set prepare.captioner.backend=vlm --set prepare.captioner.model=NAME",
        "flowreel prepare --only text --out /data/latents --recipe video-7b",
    ),
)
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
            help="Tars or loose files: a folder, one tar, {00000..00099}.tar, or a .txt list of "
            "these; path, s3://, https:// or hf://datasets/OWNER/NAME/. "
            "With --only captions: where they are now; default: where they were."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="'captions': write captions for the latents that stand, where they are missing "
            "or the recipe names another captioner; latents are not touched. 'text': encode the "
            "prompts that the recipe trains on, so that training loads no text encoder. Default: "
            "everything but 'text'.",
            autocompletion=lambda: list(_ONLY),
        ),
    ] = None,
    redo: Annotated[
        bool,
        typer.Option(
            "--redo",
            help="Where the output was made with other settings, make anew what they affect.",
        ),
    ] = False,
    recipe: RecipeOption = "tiny",
    codec: Annotated[
        str | None,
        typer.Option(help="'tiny', a folder, or a hub id; default: the recipe's codec."),
    ] = None,
    set_: SetOption = None,
    address: AddressOption = None,
    json_: JsonOption = False,
) -> None:
    """Video shards → latent shards: decode, filter, caption, encode; captions → encoded prompts.

    Run again, it does only what is left.
    """
    if only is not None:
        arguments.one_of("--only", only, list(_ONLY))
    elif shards is None:
        raise arguments.ArgumentError("--shards is missing; give the shards to prepare")
    arguments.output_folder(out)
    arguments.cluster_address(address)
    if only is not None:
        arguments.latents(out)
    if only == "text" and shards is not None:
        raise arguments.ArgumentError(
            "--shards: prompts are made of the captions in --out; leave it out with --only text"
        )
    from pipeline.recipes import load_recipe, save_recipe

    loaded = load_recipe(recipe, [*(set_ or []), *([f"codec={codec}"] if codec else [])])
    paths = arguments.shards(shards, loaded.prepare.source) if shards else None
    from pipeline.cluster import local_or_given
    from pipeline.stages import caption_again, captions_to_do, prepare_latents, shards_to_do

    said = reporter(json_)
    if only == "text":
        from pipeline.encode_texts import encode_texts, runs_on_ray, texts_to_do

        settings, left = texts_to_do(loaded, out)
        with local_or_given(loaded.cluster, address, needed=left > 0 and runs_on_ray(settings)):
            said.document(encode_texts(settings, out, said))
        # The recipe beside the latents stays the one that they were prepared with.
        return
    if only == "captions":
        left = captions_to_do(loaded, paths, out)
        with local_or_given(loaded.cluster, address, needed=left > 0):
            report = caption_again(loaded, paths, out, said)
    else:
        left = shards_to_do(loaded, paths or [], out, redo=redo)
        with local_or_given(loaded.cluster, address, needed=left > 0):
            report = prepare_latents(loaded, paths or [], out, said, redo=redo)
    save_recipe(loaded, out)
    said.document(report)


@command(
    examples=(
        "flowreel look clip.mp4",
        "flowreel look /data/panda/00000.tar 0000_00012 --recipe /data/latents/recipe.yaml",
        "flowreel look clip.mp4 --frames clip.npy --json",
    ),
)
def look(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A video or image; or a shard: a tar, a folder, an s3:// URI."
        ),
    ],
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]", help="The sample in the shard; without it: which there are."
        ),
    ] = None,
    recipe: RecipeOption = "tiny",
    codec: Annotated[
        str | None,
        typer.Option(help="'tiny', a folder, or a hub id; default: the recipe's codec."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The contact sheet, a PNG; default: look-KEY.png here, or none with --frames or "
            "--json.",
        ),
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(
            help="Also the frames, uint8 [T, H, W, 3], as .npy; a second window in NAME-1.npy."
        ),
    ] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """What preparation makes of one input, and why: the answer to "why was my clip dropped?".

    It takes the same steps as `prepare` with that recipe, on this sample alone.
    """
    arguments.sample(file, key)
    if out is not None:
        arguments.output_file(out, suffixes=(".png",))
    if frames is not None:
        arguments.output_file(frames, option="--frames", suffixes=(".npy",))
    from pipeline.recipes import load_recipe
    from pipeline.sample_look import look as run_look

    loaded = load_recipe(recipe, [*(set_ or []), *([f"codec={codec}"] if codec else [])])
    run_look(file, key, loaded, reporter(json_), sheet=out, frames=frames)


@command(examples=["flowreel inspect runs/demo/latents"])
def inspect(
    data: DataArgument,
    page: Annotated[
        Path | None, typer.Option(help="The HTML page; default: inspect.html in that folder.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, max=200, help="Thumbnails of kept, and as many of not kept.")
    ] = 24,
    codec: Annotated[
        str | None,
        typer.Option(
            help="The codec that made the latents: 'shapes', 'tiny', a folder, or a hub id; "
            "default: the one that ships here and made them."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """What a dataset holds: tables, and a page with pictures of what was kept and what was not."""
    arguments.latents(data)
    if page is not None:
        arguments.output_file(page, option="--page")
    from pipeline.dataset_page import inspect as run_inspect
    from pipeline.recipes import SHIPPED_CODECS

    source = None if codec is None else str(SHIPPED_CODECS.get(codec, codec))
    run_inspect(data, page, source, pictures, reporter(json_))


@command(resumes=True, examples=["flowreel export runs/demo/latents --out tars/ --split train"])
def export(
    data: DataArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the tars.")],
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a tar, in megabytes.")] = 1024,
    split: Annotated[
        str,
        typer.Option(help="all, train or held_out.", autocompletion=arguments.complete_split),
    ] = "all",
    json_: JsonOption = False,
) -> None:
    """Latents as WebDataset tars. Killed, run it again: tars that stand are not written anew."""
    arguments.latents(data)
    arguments.output_folder(out)
    arguments.one_of("--split", split, arguments.splits())
    from data_prep.latents.export import export_webdataset

    said = reporter(json_)
    with said.progress("exporting") as update:
        paths = export_webdataset(
            data,
            out,
            shard_bytes=shard_mb * 10**6,
            split=split,  # type: ignore[arg-type]
            progress=lambda done, total: update(done, total, "records"),
        )
    said.outcome(f"{len(paths)} tars  {out}")
    said.document({"out": out, "tars": paths})


@command(
    "merge-latents",
    resumes=True,
    examples=(
        "flowreel merge-latents /data/first-half /data/second-half --out /data/latents",
        "flowreel merge-latents s3://b/a s3://b/b --out s3://b/latents",
    ),
)
def merge_latents(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Two or more folders of latents, or s3:// URIs, prepared with one recipe.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", "-o", help="Folder of the merged dataset; path or s3:// URI."),
    ],
    json_: JsonOption = False,
) -> None:
    """Datasets of one recipe as one, as a run over all shards makes it. Files are linked or copied.

    Killed, run it again: shards that are there are not brought anew.
    """
    for location in data:
        arguments.latents(location)
    arguments.output_folder(out)
    from data_prep.latents.merge import merge_latents as run_merge

    said = reporter(json_)
    with said.progress("merging") as update:
        report = run_merge(data, out, progress=lambda done, total: update(done, total, "shards"))
    for source, name in sorted(report.renamed.items()):
        said.say(f"  {source} is shard {name}")
    how = ", ".join(f"{count} files {way}" for way, count in report.files.items() if count)
    said.outcome(
        f"{report.shards} shards, {report.records} records ({report.shards_now} shards now"
        f"{f': {how}' if how else ''})  {report.out}"
    )
    said.document(report)
