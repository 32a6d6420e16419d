"""A run of `prepare` around its stages: what is left to do, what the output is, what came of it.

Knows nothing of Ray, and imports torch only if a new output is begun.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.captions.fitness import check_fitness
from data_prep.config import BucketConfig, PrepareConfig
from data_prep.latents.duplicates import MASK_NAME, write_mask
from data_prep.latents.index import LatentIndex
from data_prep.latents.records import (
    INFO_NAME,
    Bucket,
    DatasetInfo,
    LatentDatasetError,
    read_info_values,
)
from data_prep.ledger.job import Digests, ShardJob, jobs_left
from data_prep.ledger.manifest import FOLDED_FROM, fold_manifests, read_manifests
from data_prep.ledger.problems import ShardProblem, problem_of
from data_prep.ledger.recaption import plan_captions
from data_prep.ledger.settings import changed_settings, check_settings
from data_prep.ledger.staging import Staging
from data_prep.sources.find import name_shards
from data_prep.storage.folder import Folder
from data_prep.storage.location import Location, absolute
from data_prep.storage.store import open_folder
from flow.codec_factors import read_factors
from flowreel.values import sha256_of

_RECIPE_NAME = "prepare.json"
"""The settings of the latest run, beside the data."""


@dataclass(frozen=True)
class StageFigures:
    """What a stage did in this run."""

    name: str
    workers: int
    busy_s: float
    """Seconds that its workers spent inside the stage, added up."""
    elapsed_s: float
    """Seconds from the start of its first block to the end of its last."""
    rows: int
    bytes_out: int

    @property
    def utilisation(self) -> float:
        """Share of the elapsed time that a worker was busy, mean over the workers.

        The stage with the highest utilisation holds up the others.
        """
        return self.busy_s / (self.workers * self.elapsed_s) if self.elapsed_s > 0 else 0.0


@dataclass
class RunFigures:
    """What a run itself did, filled in while it goes on."""

    samples: int = 0
    """Samples that it finished."""
    reused: int = 0
    """Samples among them whose latents or verdict an earlier run had left."""
    seconds: float = 0.0
    """Wall time of the run."""
    startup_s: float = 0.0
    """Seconds until the first sample was finished; 0 if nothing was left to do."""
    stages: tuple[StageFigures, ...] = ()
    """In order; empty if nothing was left to do."""
    resources: str = ""
    """What the preflight chose for the stages; empty if nothing was left to do."""


@dataclass(frozen=True)
class PrepareReport:
    """What came of the samples of the given shards, from their manifests."""

    counts: dict[str, int]
    """Samples by status: kept, dropped (by a filter), failed (bad input)."""
    reasons: dict[str, int]
    """Samples that are not kept, by reason code."""
    notes: dict[str, int]
    """Kept samples that are odd, by how: `bars` cut, a `json` not read, some `windows` not kept."""
    shards: int
    """Input shards that are finished, by this run or an earlier one."""
    shards_now: int
    """Input shards that this run itself finished."""
    truncated_shards: tuple[str, ...]
    """Shards that end too early, or are damaged on the way."""
    unreadable_shards: dict[str, str]
    """Why nothing could be read of a shard, by its name."""
    samples_now: int
    """Samples that this run itself finished."""
    reused_now: int
    """Samples among them whose latents or verdict an earlier run had left."""
    seconds: float
    """Wall time of the run."""
    startup_s: float
    """Seconds until the first sample was finished; 0 if nothing was left to do."""
    captions_failed: dict[str, int] = field(default_factory=dict)
    """Kept clips without a synthetic caption, by code."""
    shard_problems: tuple[ShardProblem, ...] = ()
    """What was wrong with the shards of both kinds, in the order given."""
    unjudged: dict[str, int] = field(default_factory=dict)
    """Samples that passed a metadata filter because they lack its field (`Manifest.unjudged`)."""
    unprepared_shards: tuple[str, ...] = ()
    """Shards that a captions-only run was given and that have no latents yet."""
    stages: tuple[StageFigures, ...] = ()
    """In order; empty if nothing was left to do."""
    resources: str = ""
    """What the preflight chose for the stages; empty if nothing was left to do."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def clips_per_s(self) -> float:
        """Samples finished per second after the start-up; 0 if that took less than a second."""
        working_s = self.seconds - self.startup_s
        return (self.samples_now - 1) / working_s if self.samples_now and working_s >= 1 else 0.0

    def rows(self) -> list[tuple[str, str, int]]:
        """(status, reason, samples) of the closing table; its numbers add up to `total`."""
        kept_count = self.counts.get("kept", 0)
        rows = [("kept", "", kept_count - sum(self.notes.values()))]
        rows += [("kept", note, count) for note, count in sorted(self.notes.items())]
        rows += [("not kept", reason, count) for reason, count in sorted(self.reasons.items())]
        return rows


@dataclass(frozen=True)
class RunPlan:
    """What a run has before it."""

    names: tuple[str, ...]
    """All shards given, finished or not."""
    jobs: tuple[ShardJob, ...]
    """What is left to do."""
    codec: str
    """Absolute folder of the codec, or its hub id; empty in a run of captions only."""
    out: str
    """Absolute path or URI of the output."""
    sizes: tuple[tuple[int, int], ...]
    """(rows, columns) of the buckets, in the order of the settings."""
    without_latents: tuple[str, ...] = ()
    """Shards that a captions-only run leaves out, because they have no latents."""


def codec_identity(codec: str) -> str:
    """What tells one codec from another without loading it: a hash of its files, or its hub id."""
    folder = Path(codec)
    if not folder.is_dir():
        return codec
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.relative_to(folder)}:{sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]


class _Request(NamedTuple):
    """What a run is asked for, made plain."""

    codec: str
    """Absolute folder, or hub id."""
    sources: dict[str, str]
    """Path or URI of every shard, by its name."""
    settings: dict[str, Any]
    """What decides status and latents, the codec's identity among it."""


def _request(config: PrepareConfig, shards: Sequence[str], codec: str) -> _Request:
    codec = str(Path(codec).absolute()) if Path(codec).is_dir() else codec
    sources = name_shards([absolute(source) for source in shards])
    settings = {**config.latent_settings(), "codec": codec_identity(codec)}
    return _Request(codec, sources, settings)


def plan_run(
    config: PrepareConfig, shards: Sequence[str], out: Location, codec: str, *, redo: bool = False
) -> RunPlan:
    """Name the shards, hold the settings against the output's, and list what is left to do.

    The codec is loaded, and `dataset.json` is written, only for a new output or, with `redo`, for
    other settings: readers then see no shard before it is made anew. Call it only while the
    output's lock is held; `shards_left` asks without it.

    Raises:
        ShardError: a shard is missing or given twice.
        SettingsChanged: the output was begun with other settings or another codec.
        SizeError: the codec does not take clips of the bucket's size or length.
        CodecError: the codec cannot be loaded.
        CaptionerUnfit: the captioner is not made for these videos.
        StorageError: the disk or the store fails.
    """
    folder = open_folder(absolute(out))
    request = _request(config, shards, codec)
    if _is_new(folder, request, redo=redo):
        check_fitness(config.captioner, request.sources.values())
        _begin(config, folder, request)
    # What a killed run left, so that this one does not ask for each of them.
    fold_manifests(folder, FOLDED_FROM)
    jobs = _jobs(config, folder, request)
    check_fitness(config.captioner, (job.source for job in jobs))
    _keep_recipe(config, folder)
    unfinished = {job.name for job in jobs}
    staging = Staging(folder)
    for name in staging.shards():
        if name in request.sources and name not in unfinished:
            staging.sweep(name)
    return RunPlan(
        names=tuple(request.sources),
        jobs=tuple(jobs),
        codec=request.codec,
        out=folder.location,
        sizes=_sizes(config.bucket, folder),
    )


def shards_left(
    config: PrepareConfig, shards: Sequence[str], out: Location, codec: str, *, redo: bool = False
) -> int:
    """How many shards a run would still have to prepare; writes nothing. Raises as `plan_run`."""
    folder = open_folder(absolute(out))
    request = _request(config, shards, codec)
    if _is_new(folder, request, redo=redo):
        config.bucket.check(read_factors(request.codec))
        check_fitness(config.captioner, request.sources.values())
        return len(request.sources)
    jobs = _jobs(config, folder, request)
    check_fitness(config.captioner, (job.source for job in jobs))
    return len(jobs)


def plan_caption_run(config: PrepareConfig, shards: Sequence[str] | None, out: Location) -> RunPlan:
    """What `--only captions` has to do: see `data_prep.ledger.recaption.plan_captions`."""
    folder = open_folder(absolute(out))
    sources = None if shards is None else [absolute(source) for source in shards]
    plan = plan_captions(config, sources, folder.location)
    check_fitness(config.captioner, (job.source for job in plan.jobs))
    _keep_recipe(config, folder)
    return RunPlan(
        names=plan.names,
        jobs=plan.jobs,
        codec="",
        out=folder.location,
        sizes=_sizes(config.bucket, folder),
        without_latents=plan.without_latents,
    )


def located(config: PrepareConfig) -> PrepareConfig:
    """The settings with a model's folder made absolute: workers have other working folders."""
    model = config.captioner.model
    if config.captioner.backend == "http" or not model or not Path(model).is_dir():
        return config
    captioner = config.captioner.model_copy(update={"model": str(Path(model).absolute())})
    return config.model_copy(update={"captioner": captioner})


def _is_new(folder: Folder, request: _Request, *, redo: bool) -> bool:
    """Whether `dataset.json` has to be written. Raises SettingsChanged unless `redo`."""
    if not redo:
        check_settings(folder, request.settings)
    return not folder.exists(INFO_NAME) or bool(changed_settings(folder, request.settings))


def _keep_recipe(config: PrepareConfig, folder: Folder) -> None:
    """Write the latest settings beside the data: the captioner may change between runs."""
    recipe = json.dumps(located(config).model_dump(mode="json"), indent=1).encode()
    if not folder.exists(_RECIPE_NAME) or folder.read(_RECIPE_NAME) != recipe:
        folder.write(_RECIPE_NAME, recipe)


def _jobs(config: PrepareConfig, folder: Folder, request: _Request) -> list[ShardJob]:
    info = read_info_values(folder.location)
    digests = Digests(
        latent=info["prepare_digest"],
        caption=config.caption_digest(),
        outcome=config.outcome_digest(info["codec_digest"]),
        encode=config.encode_digest(info["codec_digest"]),
    )
    return jobs_left(folder, request.sources, digests, verify=config.verify)


def _begin(config: PrepareConfig, folder: Folder, request: _Request) -> None:
    """Write `dataset.json`: what is common to everything that this output will hold."""
    bucket = config.bucket
    factors = read_factors(request.codec)
    # Before the codec is loaded, which may take a while.
    bucket.check(factors)
    from flow.codec import VideoCodec

    codec = VideoCodec.load(request.codec)
    lengths = {*bucket.lengths, 1} if config.images else {*bucket.lengths}
    buckets = {Bucket(n, *size) for n in lengths for size in bucket.all_sizes(factors.space)}
    info = DatasetInfo(
        codec_digest=codec.digest,
        convention=codec.convention,
        fps=bucket.fps,
        buckets=tuple(sorted(buckets)),
        latent_channels=codec.latent_channels,
        prepare_digest=config.latent_digest(codec.digest),
    )
    values = {**info.to_dict(), "settings": request.settings}
    folder.write(INFO_NAME, json.dumps(values, indent=1, sort_keys=True).encode())


def _sizes(bucket: BucketConfig, folder: Folder) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of an output's buckets, in the order of the settings.

    The codec need not be at hand. The sides of aspects are multiples of its factor in space: of the
    common divisors of all sides in `dataset.json`, it is one that gives the same sizes again.
    """
    buckets = [Bucket.parse(text) for text in read_info_values(folder.location)["buckets"]]
    sizes = {(b.height, b.width) for b in buckets}
    divisor = math.gcd(*(side for size in sizes for side in size))
    for space in (n for n in range(divisor, 0, -1) if divisor % n == 0):
        in_order = bucket.all_sizes(space)
        if set(in_order) == sizes:
            return tuple(in_order)
    raise LatentDatasetError(
        f"{folder.where(INFO_NAME)} names sizes {sorted(sizes)}, which the bucket's settings do "
        "not give; prepare into another output"
    )


def finish_run(plan: RunPlan, config: PrepareConfig) -> None:
    """Make what is made of all shards together: one file of manifests, the index, and the mask.

    Call it while the output's lock is held, once the writers of the run have nothing left to do.
    """
    folder = open_folder(plan.out)
    fold_manifests(folder)
    LatentIndex.open(plan.out)
    if config.duplicate_bits is None:
        folder.remove(MASK_NAME)
    else:
        write_mask(folder, config.duplicate_bits)


def report_of(plan: RunPlan, figures: RunFigures) -> PrepareReport:
    """Add up the manifests of the run's shards, beside what the run itself did."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    unjudged: Counter[str] = Counter()
    problems, shards = list[ShardProblem](), 0
    for manifest in read_manifests(open_folder(plan.out), plan.names):
        shards += 1
        counts.update(manifest.counts)
        reasons.update(manifest.reasons)
        failures.update(manifest.captions.failures or {})
        notes.update(manifest.notes or {})
        unjudged.update(manifest.unjudged or {})
        if (problem := problem_of(manifest)) is not None:
            problems.append(problem)
    return PrepareReport(
        counts=dict(sorted(counts.items())),
        reasons=dict(sorted(reasons.items())),
        notes=dict(sorted(notes.items())),
        shards=shards,
        shards_now=len(plan.jobs),
        truncated_shards=tuple(p.shard for p in problems if p.problem == "truncated"),
        unreadable_shards={p.shard: p.why for p in problems if p.problem == "unreadable"},
        shard_problems=tuple(problems),
        unjudged=dict(sorted(unjudged.items())),
        samples_now=figures.samples,
        reused_now=figures.reused,
        seconds=figures.seconds,
        startup_s=figures.startup_s,
        captions_failed=dict(sorted(failures.items())),
        unprepared_shards=plan.without_latents,
        stages=figures.stages,
        resources=figures.resources,
    )
