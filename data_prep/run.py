"""A run of `prepare` around its pipeline: what is left to do, what the output is, what came of it.

Knows the ledger and the codec's files; nothing of Ray, and torch only where the codec is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.config import PrepareConfig
from data_prep.latents.duplicates import MASK_NAME, write_mask
from data_prep.latents.index import LatentIndex
from data_prep.latents.records import (
    Bucket,
    DatasetInfo,
    read_info_values,
)
from data_prep.ledger.job import Digests, ShardJob
from data_prep.ledger.ledger import Ledger, sha256_of
from data_prep.ledger.recaption import failed_captions, plan_captions
from data_prep.sources.find import name_shards
from data_prep.storage.location import Location, absolute
from data_prep.storage.store import open_folder


@dataclass(frozen=True)
class StageFigures:
    """What a stage did in this run."""

    name: str
    workers: int
    busy_s: float
    """Seconds its workers spent inside the stage, added up."""
    span_s: float
    """From the start of its first block to the end of its last."""
    rows: int
    bytes_out: int

    @property
    def utilisation(self) -> float:
        """Share of the stage's span that a worker was busy, mean over the workers: the fullest stage holds up the rest."""
        return self.busy_s / (self.workers * self.span_s) if self.span_s > 0 else 0.0


@dataclass(frozen=True)
class PrepareReport:
    """What came of the samples of the given shards, from their manifests."""

    counts: dict[str, int]
    """Samples by status: kept, dropped (a filter), failed (bad input)."""
    reasons: dict[str, int]
    """Samples by reason code, for those not kept."""
    notes: dict[str, int]
    """Kept samples that were odd, by how: `bars` cut, a `json` not read, some `windows` not kept."""
    shards: int
    """Input shards, done before or now."""
    shards_done_now: int
    truncated_shards: tuple[str, ...]
    unreadable_shards: dict[str, str]
    """Name of a shard that is no tar → why."""
    samples_now: int
    """Samples that this run itself finished."""
    reused_now: int
    """Those among them whose latents or verdict stood already, of an earlier run of other settings or input."""
    seconds: float
    """Wall time of the run."""
    startup_s: float
    """Until the first sample was finished; 0 where nothing was left to do."""
    captions_failed: dict[str, int] = field(default_factory=dict)
    """Kept clips without a synthetic caption, by code."""
    unprepared_shards: tuple[str, ...] = ()
    """Shards that a captions-only run was given and that have no latents yet."""
    stages: tuple[StageFigures, ...] = ()
    """In order; empty where nothing was left to do."""
    resources: str = ""
    """What the preflight chose for the stages; empty where nothing was left to do."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def clips_per_s(self) -> float:
        """Samples finished per second after the start-up, 0 where there were none."""
        working_s = self.seconds - self.startup_s
        return (self.samples_now - 1) / working_s if self.samples_now > 1 and working_s > 0 else 0.0

    def rows(self) -> list[tuple[str, str, int]]:
        """(status, reason, samples) of the closing table; its numbers add up to `total`."""
        kept = self.counts.get("kept", 0)
        rows = [("kept", "", kept - sum(self.notes.values()))]
        rows += [("kept", note, count) for note, count in sorted(self.notes.items())]
        rows += [("not kept", reason, count) for reason, count in sorted(self.reasons.items())]
        return rows


@dataclass(frozen=True)
class RunPlan:
    """What a run has before it."""

    names: tuple[str, ...]
    """Of all shards given, done or not."""
    jobs: tuple[ShardJob, ...]
    """What is left."""
    codec: str
    """Absolute folder of the codec, or its hub id."""
    out: str
    """Absolute path or URI of the output."""
    unprepared: tuple[str, ...] = ()
    """Shards that a captions-only run leaves out: they have no latents."""


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


def plan_run(
    config: PrepareConfig, shards: Sequence[str], out: Location, codec: str, *, redo: bool = False
) -> RunPlan:
    """Name the shards, hold the settings against the output's, and list what is left to do.

    The codec is loaded, and `dataset.json` and `prepare.json` written, only for a new output, or, with `redo`, for other
    settings: readers then see no shard before it is made anew. Only for who holds the output's lock: `shards_left`
    asks without it.

    Raises:
        ShardError: a shard is missing or given twice.
        SettingsChanged: the output was begun with other settings or another codec.
        CodecError: the codec cannot be loaded.
        StorageError: the disk or the store fails.
    """
    ledger = Ledger(absolute(out))
    codec, named, settings = _asked_for(config, shards, codec)
    if not redo:
        ledger.check_settings(settings)
    if not ledger.folder.exists("dataset.json") or ledger.changed_settings(settings):
        _begin(config, ledger, codec, settings)
    _keep_recipe(config, ledger)
    jobs = _jobs(config, ledger, named)
    left = {job.name for job in jobs}
    for name in ledger.folder.folders("staging"):
        if name in named and name not in left:
            ledger.sweep(name)
    return RunPlan(tuple(named), tuple(jobs), codec, str(ledger.out))


def shards_left(
    config: PrepareConfig, shards: Sequence[str], out: Location, codec: str, *, redo: bool = False
) -> int:
    """How many shards a run would still have to prepare; writes nothing. Raises as `plan_run`."""
    ledger = Ledger(absolute(out))
    codec, named, settings = _asked_for(config, shards, codec)
    if not redo:
        ledger.check_settings(settings)
    if not ledger.folder.exists("dataset.json") or ledger.changed_settings(settings):
        return len(named)
    return len(_jobs(config, ledger, named))


def plan_caption_run(config: PrepareConfig, shards: Sequence[str] | None, out: Location) -> RunPlan:
    """What `--only captions` has to do: see `data_prep.ledger.recaption.plan_captions`."""
    out = absolute(out)
    sources = None if shards is None else [absolute(source) for source in shards]
    plan = plan_captions(config, sources, out)
    _keep_recipe(config, Ledger(out))
    return RunPlan(plan.names, plan.jobs, codec="", out=out, unprepared=plan.unprepared)


def located(config: PrepareConfig) -> PrepareConfig:
    """The settings with a model folder made absolute: workers have other working folders."""
    model = config.captioner.model
    if config.captioner.backend == "http" or not model or not Path(model).is_dir():
        return config
    captioner = config.captioner.model_copy(update={"model": str(Path(model).absolute())})
    return config.model_copy(update={"captioner": captioner})


def _keep_recipe(config: PrepareConfig, ledger: Ledger) -> None:
    """The captioner may change between runs; the recipe beside the data is the latest."""
    recipe = json.dumps(located(config).model_dump(mode="json"), indent=1).encode()
    if not ledger.folder.exists("prepare.json") or ledger.folder.read("prepare.json") != recipe:
        ledger.folder.write("prepare.json", recipe)


def _asked_for(
    config: PrepareConfig, shards: Sequence[str], codec: str
) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The codec's absolute folder or id, the shards' sources by name, and the output's settings."""
    codec = str(Path(codec).absolute()) if Path(codec).is_dir() else codec
    named = name_shards([absolute(source) for source in shards])
    return codec, named, {**config.latent_settings(), "codec": codec_identity(codec)}


def _jobs(config: PrepareConfig, ledger: Ledger, named: dict[str, str]) -> list[ShardJob]:
    info = read_info_values(ledger.out)
    digests = Digests(
        latent=info["prepare_digest"],
        caption=config.caption_digest(),
        outcome=config.outcome_digest(info["codec_digest"]),
        encode=config.encode_digest(info["codec_digest"]),
    )
    return ledger.jobs(named, digests, verify=config.verify)


def _begin(config: PrepareConfig, ledger: Ledger, codec: str, settings: dict[str, Any]) -> None:
    """Write `dataset.json`: what is common to everything this output will hold."""
    from flow.codec import VideoCodec

    loaded = VideoCodec.load(codec)
    size = config.bucket
    lengths = {size.num_frames, 1} if config.images else {size.num_frames}
    buckets = {Bucket(n, *sides) for n in lengths for sides in size.all_sizes()}
    info = DatasetInfo(
        codec_digest=loaded.digest,
        convention=loaded.convention,
        fps=size.fps,
        buckets=tuple(sorted(buckets)),
        latent_channels=loaded.latent_channels,
        prepare_digest=config.latent_digest(loaded.digest),
    )
    values = {**info.to_dict(), "settings": settings}
    text = json.dumps(values, indent=1, sort_keys=True)
    ledger.folder.write("dataset.json", text.encode())


def finish_run(plan: RunPlan, config: PrepareConfig) -> None:
    """What is made of all shards together, once they stand: the index, and the mask of near-duplicates where one is wanted."""
    LatentIndex.open(plan.out)
    folder = open_folder(plan.out)
    if config.duplicate_bits is None:
        folder.remove(MASK_NAME)
    else:
        write_mask(folder, config.duplicate_bits)


def report_of(
    plan: RunPlan,
    *,
    samples_now: int,
    reused_now: int = 0,
    seconds: float,
    startup_s: float,
    stages: tuple[StageFigures, ...] = (),
    resources: str = "",
) -> PrepareReport:
    """Add up the manifests of the run's shards."""
    ledger = Ledger(plan.out)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    truncated, unreadable, standing = [], {}, 0
    for manifest in ledger.manifests(plan.names):
        name = manifest["shard"]
        standing += 1
        counts.update(manifest["counts"])
        reasons.update(manifest["reasons"])
        failed.update(failed_captions(manifest))
        notes.update(manifest.get("notes", {}))
        if manifest["truncated"]:
            truncated.append(name)
        if manifest["error"]:
            unreadable[name] = manifest["error"]
    return PrepareReport(
        counts=dict(sorted(counts.items())),
        reasons=dict(sorted(reasons.items())),
        notes=dict(sorted(notes.items())),
        shards=standing,
        shards_done_now=len(plan.jobs),
        truncated_shards=tuple(truncated),
        unreadable_shards=unreadable,
        samples_now=samples_now,
        reused_now=reused_now,
        seconds=seconds,
        startup_s=startup_s,
        captions_failed=dict(sorted(failed.items())),
        unprepared_shards=plan.unprepared,
        stages=stages,
        resources=resources,
    )
