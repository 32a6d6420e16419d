"""Commands around a latent dataset: prepare, inspect, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import (
    AddressOption,
    RecipeOption,
    SetOption,
    app,
    shards_of,
    user_errors,
)


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
    redo: Annotated[
        bool,
        typer.Option(
            "--redo",
            help="Where the output was made with other settings, make anew what they affect.",
        ),
    ] = False,
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
    paths = shards_of(shards) if shards else None
    from pipeline.cluster import local_or_given
    from pipeline.console import Reporter
    from pipeline.stages import caption_again, captions_to_do, prepare_latents, shards_to_do

    if only == "captions":
        with local_or_given(loaded.cluster, address, needed=captions_to_do(loaded, paths, out) > 0):
            caption_again(loaded, paths, out, Reporter())
    else:
        left = shards_to_do(loaded, paths or [], out, redo=redo)
        with local_or_given(loaded.cluster, address, needed=left > 0):
            prepare_latents(loaded, paths or [], out, Reporter(), redo=redo)
    save_recipe(loaded, out)


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
    from pipeline.dataset_page import inspect as run_inspect
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
    from data_prep.latents.export import export_webdataset
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
