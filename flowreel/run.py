"""The three arrows from Python: prepare shards, train a model, serve it.

Each function is the command of the same name without its printing: it resolves the recipe, connects
to Ray where anything is left to do, calls `pipeline.stages`, and saves the recipe beside what was
made. A call that was interrupted goes on when it is made again. Knows nothing of samples, steps or
requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from data_prep.run import PrepareReport
from data_prep.sources.find import find_shards
from data_prep.storage.location import Location
from flowreel.model import Model
from pipeline import stages
from pipeline.cluster import local_or_given
from pipeline.console import Reporter
from pipeline.recipes import Recipe, load_recipe, save_recipe
from training.run import TrainResult

if TYPE_CHECKING:
    from pipeline.stages import ServedApp


def prepare(
    recipe: Recipe | str | Path,
    shards: str | Sequence[str] | None,
    out: Location,
    *,
    only: Literal["captions"] | None = None,
    redo: bool = False,
    address: str | None = None,
    verbose: bool = False,
) -> PrepareReport:
    """Video shards → latent shards; what `flowreel prepare` does.

    Args:
        recipe: a recipe, its name or its file.
        shards: a folder, a tar, a range such as "{00000..00099}.tar" or a .txt list; or a list of
            shards. With `only`, None means where they were.
        out: folder of the latents, path or s3:// URI; `LatentDataset` reads it.
        only: "captions" writes captions alone, for latents that stand.
        redo: make anew what other settings affect, instead of refusing them.
        address: a Ray cluster; None starts one here and ends it.
        verbose: print progress and a table, as the command does.

    Raises:
        FlowreelError: bad input, other settings than the output's, a full disk; the message says
            which, and what to do.
    """
    recipe, out, reporter = _recipe(recipe), str(out), _reporter(verbose)
    sources = find_shards(shards) if isinstance(shards, str) else shards
    if only == "captions":
        given = None if sources is None else list(sources)
        left = stages.captions_to_do(recipe, given, out)
        with local_or_given(recipe.cluster, address, needed=left > 0):
            report = stages.caption_again(recipe, given, out, reporter)
    else:
        given = list(sources or ())
        left = stages.shards_to_do(recipe, given, out, redo=redo)
        with local_or_given(recipe.cluster, address, needed=left > 0):
            report = stages.prepare_latents(recipe, given, out, reporter, redo=redo)
    save_recipe(recipe, out)
    return report


def train(
    recipe: Recipe | str | Path,
    data: Location,
    out: str | Path,
    *,
    address: str | None = None,
    verbose: bool = False,
) -> TrainResult:
    """Latent shards → checkpoints and a model folder; what `flowreel train` does.

    Args:
        recipe: a recipe, its name or its file.
        data: latents that `prepare` wrote, path or s3:// URI.
        out: folder of the run; on a cluster, on storage that its machines share.
        address: a Ray cluster; None starts one here and ends it.
        verbose: print progress, as the command does.

    Returns:
        Among others `model_dir`, the folder for `load`, and `history`, one line a step.

    Raises:
        FlowreelError: data, codec and recipe do not fit together, or a worker failed; the message
            says which, and what to do.
    """
    recipe, out = _recipe(recipe), Path(out)
    needed = stages.training_to_do(recipe, str(data), out)
    with local_or_given(recipe.cluster, address, needed=needed):
        result = stages.train(recipe, str(data), out, _reporter(verbose))
    save_recipe(recipe, out)
    return result


@contextmanager
def serve(
    model: Model | str | Path,
    *,
    recipe: Recipe | str | Path = "tiny",
    data_dir: str | Path = "runs/served",
    host: str | None = None,
    port: int | None = None,
    address: str | None = None,
) -> Iterator[ServedApp]:
    """Model folder → HTTP endpoint, for as long as the `with` block lasts; see `flowreel serve`.

    Args:
        model: a model folder, or a model loaded from one.
        recipe: whose `serve` and `sampler` are used: a recipe, its name or its file.
        data_dir: where jobs and videos are kept; they stay when the service stops.
        host, port: where it listens; None: the recipe's. Port 0 takes a free one.
        address: a Ray cluster; None starts one here and ends it.

    Yields:
        The running service; `url` is its address.

    Raises:
        ServeStartError: the port is taken, or not ready in time.
        CheckpointError, InvalidRequest: the folder holds no model that makes videos.
    """
    recipe = _recipe(recipe)
    folder = model.folder if isinstance(model, Model) else Path(model)
    with (
        local_or_given(recipe.cluster, address),
        stages.serve(recipe, folder, Path(data_dir), host=host, port=port) as app,
    ):
        yield app


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))


def _reporter(verbose: bool) -> Reporter:
    return Reporter() if verbose else Reporter(console=Console(quiet=True))
