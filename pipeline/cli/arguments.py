"""Checks of arguments and paths before anything heavy is imported, and their completion.

A wrong path or a misspelt choice is answered at once, not after torch and Ray have been loaded.
Every check raises `ArgumentError`, worded for users. Knows nothing of torch or Ray.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from flowreel.errors import FlowreelError
from pipeline.shipped import shipped_model

if TYPE_CHECKING:
    from data_prep.sources.config import SourceConfig

VIDEO_SUFFIXES = (".mp4", ".png")
"""What `flowreel sample` writes: a video, or one frame."""
CONNECT_S = 5.0
MAX_LONG_S = 3600.0
"""A longer video would not fit into memory as one."""
DTYPES = ("keep", "bf16", "fp32")
"""Of imported weights; a test holds them equal to those of `pipeline.import_released`."""

FAMILIES = ("nats", "prompts", "sampler", "codec", "distances", "motion", "physics", "drift")
"""What `flowreel evaluate` measures; a test holds them equal to those of `pipeline.evaluation`."""


class ArgumentError(FlowreelError, ValueError):
    """An argument or a path that a command cannot work with."""


def one_of(option: str, value: str, allowed: Iterable[str]) -> str:
    """The value, if it is a known choice of the option.

    >>> one_of("--split", "train", ("all", "train"))
    'train'
    >>> one_of("--split", "trian", ("all", "train"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pipeline.cli.arguments.ArgumentError: --split 'trian': must be one of all, train; did you ...
    """
    choices = list(allowed)
    if value in choices:
        return value
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ArgumentError(f"{option} {value!r}: must be one of {', '.join(choices)}{hint}")


def several(option: str, value: str) -> tuple[str, ...]:
    """The parts of a list with commas, each once.

    >>> several("--only", "nats, codec,nats")
    ('nats', 'codec')
    """
    parts = tuple(dict.fromkeys(part for text in value.split(",") if (part := text.strip())))
    if not parts:
        raise ArgumentError(f"{option} {value!r}: names nothing; leave it out for all")
    return parts


def lengths_s(option: str, value: str) -> tuple[float, ...]:
    """Lengths of time in seconds, a list with commas.

    >>> lengths_s("--long", "30,2.5")
    (30.0, 2.5)
    """
    lengths = []
    for text in several(option, value):
        try:
            length = float(text)
        except ValueError:
            length = math.nan
        if not 0 < length <= MAX_LONG_S:
            raise ArgumentError(
                f"{option} {text!r}: must be seconds above 0, at most {MAX_LONG_S:g}; such as "
                "30,60,120"
            )
        lengths.append(length)
    return tuple(lengths)


def model_folder(path: str) -> Path:
    """The model folder at a path: it has a config.json that describes a flow, and weights."""
    folder = Path(path)
    if not folder.exists():
        raise ArgumentError(
            f"{path}: no such model folder; `flowreel train` and `flowreel import-weights` make one"
        )
    if not folder.is_dir():
        raise ArgumentError(f"{path} is a file; give the model's folder")
    config = folder / "config.json"
    if not config.is_file():
        inside = [p for p in ("model", "train/model") if (folder / p / "config.json").is_file()]
        hint = f"; did you mean {folder / inside[0]}?" if inside else ""
        raise ArgumentError(f"{path} is no model folder: it has no config.json{hint}")
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"{config} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "flow" not in fields:
        raise ArgumentError(f"{path} is no model folder: its config.json describes no flow")
    if not any(folder.glob("*.safetensors")):
        raise ArgumentError(f"{path} holds no weights: no .safetensors file lies in it")
    return folder


def model_or_shipped(path: str | None) -> Path:
    """The model folder that is named, checked, or else the weights that ship."""
    return shipped_model() if path is None else model_folder(path)


def run_folder(path: Path) -> Path:
    """The folder of a training run: it has a history, has begun to have one, or walks stages."""
    if not path.is_dir():
        raise ArgumentError(f"{path}: no such folder; give the --out of a `flowreel train`")
    files = ("history.jsonl", "train.json")
    if not any((path / name).is_file() for name in files) and not (path / "stages").is_dir():
        inside = (path / "train" / "train.json").is_file()
        hint = f"; did you mean {path / 'train'}?" if inside else ""
        raise ArgumentError(f"{path} is no training run: it has no history.jsonl{hint}")
    return path


def input_file(path: Path, what: str) -> Path:
    """A file that is there and can be read."""
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder; give {what}")
    if not path.exists():
        raise ArgumentError(f"{path}: no such file; give {what}")
    if not os.access(path, os.R_OK):
        raise ArgumentError(f"{path}: no permission to read it")
    return path


def sample(source: str, key: str | None) -> None:
    """A video or image by itself, or a key of a shard; one in an object store is not asked for."""
    from data_prep.storage.location import is_uri

    if is_uri(source) or Path(source).is_dir():
        return
    input_file(Path(source), "a video, an image or a shard")
    from data_prep.sources.one_sample import is_shard

    if key is not None and not is_shard(source):
        raise ArgumentError(
            f"{source} is a file by itself, and has no key {key!r}; leave the key out"
        )


def latents(location: str) -> str:
    """A dataset of latents; one in an object store is not asked for before it is opened."""
    from data_prep.storage.location import absolute
    from data_prep.storage.uris import check_folder, is_uri

    if is_uri(location):
        check_folder(location)
        return location
    folder = Path(absolute(location))
    if not folder.is_dir():
        raise ArgumentError(f"{location}: no such folder; `flowreel prepare` writes one of latents")
    if not (folder / "dataset.json").is_file():
        inside = (folder / "latents" / "dataset.json").is_file()
        hint = f"; did you mean {folder / 'latents'}?" if inside else "; prepare one"
        raise ArgumentError(f"no latent dataset in {location}: dataset.json is missing{hint}")
    return location


def output_folder(location: str | Path, *, option: str = "--out") -> None:
    """A folder that is there or can be made; object stores are not asked."""
    from data_prep.storage.location import absolute
    from data_prep.storage.uris import check_folder, is_uri

    if is_uri(location):
        check_folder(location)
        return
    path = Path(absolute(location))
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"{option} {location} is a file; give a folder")
    _check_writable(path, option, location)


def output_file(path: Path, *, option: str = "--out", suffixes: tuple[str, ...] = ()) -> None:
    """A file that can be written or replaced."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ArgumentError(f"{option} {path}: must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ArgumentError(f"{option} {path} is a folder; give a file")
    # A file is written beside its place and renamed: that must never replace a device.
    if path.exists() and not path.is_file():
        raise ArgumentError(f"{option} {path} is no ordinary file; give one")
    _check_writable(path.absolute().parent, option, path)


def _check_writable(folder: Path, option: str, given: str | Path) -> None:
    """Refuse a place in which nothing can be made."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ArgumentError(f"{option} {given}: {there} is a file, so nothing can be made in it")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentError(f"{option} {given}: no permission to write in {there}")


def cluster_address(address: str | None) -> None:
    """Something listens at HOST:PORT; Ray itself would ask there for ten minutes."""
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)", address or "")
    if match is None:
        return  # such as `auto`, which Ray resolves
    try:
        with socket.create_connection((match["host"], int(match["port"])), CONNECT_S):
            return
    except (OSError, OverflowError) as error:
        raise ArgumentError(
            f"--address {address}: nothing answers there ({error.args[-1]}); start a cluster with "
            "`ray start --head`, or leave --address out"
        ) from error


def as_utf8(text: str) -> str:
    """Text of the command line in a locale that is not UTF-8: its bytes are UTF-8 all the same."""
    return os.fsencode(text).decode("utf-8", "replace")


def shards(pattern: str, config: SourceConfig) -> list[str]:
    """The shards that a user names; `config` says which loose files are media and captions."""
    from data_prep.sources.find import find_shards

    return find_shards(pattern, config)


def complete_recipe(incomplete: str) -> list[str]:
    """Names of the recipes that ship; where none begins so, the shell offers files."""
    folder = Path(__file__).parents[1] / "recipes"
    return [p.stem for p in sorted(folder.glob("*.yaml")) if p.stem.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Keys for `--set`, up to the `=`."""
    from pipeline.settings import recipe_settings

    keys = (f"{setting.key}=" for setting in recipe_settings())
    return [key for key in keys if key.startswith(incomplete)]


def complete_section(incomplete: str) -> list[str]:
    """Sections for `flowreel settings`."""
    from pipeline.settings import section_names

    return [name for name in section_names() if name.startswith(incomplete)]


def complete_stage(incomplete: str) -> list[str]:
    """What a job of a cluster can run."""
    from pipeline.cluster import SUBMITTED_STAGES

    return [name for name in SUBMITTED_STAGES if name.startswith(incomplete)]


def complete_schedule(incomplete: str) -> list[str]:
    """Schedules of the deep block."""
    return [name for name in schedules() if name.startswith(incomplete)]


def complete_denoiser(incomplete: str) -> list[str]:
    """What takes the noise away."""
    return [name for name in denoisers() if name.startswith(incomplete)]


def schedules() -> tuple[str, ...]:
    """The schedules that a request may name."""
    from flow.sample_spec import Schedule

    return get_args(Schedule)


def denoisers() -> tuple[str, ...]:
    """The denoisers that a recipe may name."""
    from serving.config import SamplingConfig

    return get_args(SamplingConfig.model_fields["denoiser"].annotation)


def splits() -> tuple[str, ...]:
    """The splits of a dataset."""
    from data_prep.latents.dataset import Split

    return get_args(Split)


def complete_split(incomplete: str) -> list[str]:
    """Splits of a dataset."""
    return [name for name in splits() if name.startswith(incomplete)]
