"""Captions of shards whose latents stand: which samples want one, and the commit that gives it.

The clips are decoded again from their source shards, the same windows by the same settings; latent
and status files are not touched. A shard's file of captions is replaced and its manifest rewritten
last, so that a kill leaves the old captions or the new ones. Captions of the same captioner are not
written again: only missing ones are. Knows nothing of Ray or of captioners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_prep.config import PrepareConfig
from data_prep.latents.records import read_info_values, stored_rows
from data_prep.ledger.commit import Committer
from data_prep.ledger.errors import SourceGone
from data_prep.ledger.job import ShardJob
from data_prep.ledger.manifest import Manifest, Manifests, read_manifest
from data_prep.ledger.settings import check_settings
from data_prep.ledger.staging import Staging
from data_prep.row import FINAL_CAPTION_CODES, Row, is_final
from data_prep.sources.find import content_sha256, fingerprint, name_shards
from data_prep.sources.listing import ShardError
from data_prep.storage.folder import Folder
from data_prep.storage.store import open_folder
from data_prep.storage.uris import Location, shown


@dataclass(frozen=True)
class CaptionPlan:
    """What a captions-only run has before it."""

    names: tuple[str, ...]
    """Prepared shards that were asked for."""
    jobs: tuple[ShardJob, ...]
    """The shards among them with captions to write."""
    without_latents: tuple[str, ...]
    """Shards asked for that have no latents yet."""


def plan_captions(
    config: PrepareConfig, shards: Sequence[str] | None, out: Location
) -> CaptionPlan:
    """What `--only captions` has to do for an output.

    Args:
        config: the settings; all but the captioner's must be those of the output.
        shards: where the source shards are now; None for where they were.
        out: the output of an earlier `prepare`.

    Raises:
        LatentDatasetError: nothing was prepared there.
        SettingsChanged: other settings than the captioner's differ.
        SourceGone: a shard is missing or changed; nothing has been written then.
    """
    folder = open_folder(out)
    info = read_info_values(out)
    settings = info.get("settings", {})
    # The codec is not used, so it need not be at hand: its identity is taken as it stands.
    check_settings(folder, {**config.latent_settings(), "codec": settings.get("codec")})
    latent_digest = info["prepare_digest"]
    manifests = Manifests(folder)
    if shards is None:
        sources = {m.shard: m.source for m in manifests.read() if m.latent_digest == latent_digest}
    else:
        sources = name_shards(shards)
    caption_digest = config.caption_digest()
    staging = Staging(folder)
    jobs, names, without_latents, problems = [], [], [], []
    for name, source in sorted(sources.items()):
        manifest = manifests.get(name)
        if manifest is None or manifest.latent_digest != latent_digest:
            without_latents.append(name)
            continue
        names.append(name)
        tried_again = set(manifest.captions.failures or ()) - set(FINAL_CAPTION_CODES)
        if manifest.caption_digest == caption_digest and not tried_again:
            staging.sweep(name)
            continue
        problem, now = _source_problem(manifest, source, verify=config.verify)
        if problem:
            problems.append(f"{name}: {problem}")
        job = ShardJob(
            name=name,
            source=source,
            fingerprint=now,
            latent_digest=manifest.latent_digest,
            caption_digest=caption_digest,
        )
        jobs.append(job.captions_only(manifest))
    if problems:
        _refuse(problems)
    return CaptionPlan(tuple(names), tuple(jobs), tuple(without_latents))


def _source_problem(manifest: Manifest, source: str, *, verify: bool) -> tuple[str, str]:
    """What is wrong with a source shard, or "", and its fingerprint now."""
    try:
        now = fingerprint(source)
        if verify and content_sha256(source) != manifest.sha256:
            return f"{shown(source)} holds other bytes than were prepared", now
    except ShardError as error:
        return str(error), ""
    if not verify and now != manifest.fingerprint:
        return f"{shown(source)} has another size or time than was prepared", now
    return "", now


def _refuse(problems: Sequence[str]) -> None:
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise SourceGone(
        "captions are made from the clips' frames, and not all source shards are as they were "
        f"prepared ({'; '.join(problems[:5])}{more}). Put them back; or give where they are now as "
        "--shards (with --set prepare.verify=true where only their times differ); where a "
        "shard was meant to change, run prepare without --only"
    )


def numbers_to_skip(staging: Staging, job: ShardJob) -> set[int]:
    """Numbers of the samples that need not be read: staged, or without a caption to write."""
    staged_numbers = staging.numbers(job)
    manifest = None if job.encode else read_manifest(staging.folder, job.name)
    if manifest is None:
        return staged_numbers
    return staged_numbers | (
        set(range(manifest.num_samples)) - numbers_to_caption(staging.folder, job, manifest)
    )


def commit_captions(committer: Committer, job: ShardJob, manifest: Manifest) -> None:
    """Write the shard's captions and manifest. Every caption that it wants is staged.

    Args:
        committer: of the output.
        job: the job that is done, one of captions only.
        manifest: that of the shard's latents, which stand.
    """
    folder, staging = committer.folder, committer.staging
    to_caption = numbers_to_caption(folder, job, manifest)
    samples = staging.samples(job)
    numbers = _kept_numbers(folder, manifest)
    rows = []
    for row in _caption_rows(folder, manifest):
        number = numbers[row["key"]]
        if number in to_caption:
            row = _recaptioned(row, samples[number].rows if number in samples else [])
        rows.append(row)
    entry = committer.write_captions(job.name, rows)
    others = [entry for entry in manifest.files if entry.kind != "captions"]
    committer.write_manifest(
        replace(
            manifest,
            caption_digest=job.caption_digest,
            job=job.digest,
            files=(*others, entry),
        )
    )
    staging.forget(job)


def _recaptioned(row: Row, staged_rows: list[Row]) -> Row:
    """A caption row with what this run made of the sample's windows.

    Nothing is staged of a sample that is not in the source shard any more.
    """
    for new in staged_rows:
        if new["status"] == "kept" and new["window"] == row["window"]:
            texts = {name: new[name] for name in ("synthetic", "captioner", "caption_error")}
            return {**row, **texts}
    code, detail = "not_in_shard", "the source shard holds fewer samples than were prepared"
    if staged_rows:
        code, detail = staged_rows[0]["reason"] or "no_window", staged_rows[0]["detail"]
    return {**row, "synthetic": "", "captioner": "", "caption_error": f"{code}: {detail}"}


def numbers_to_caption(folder: Folder, job: ShardJob, manifest: Manifest) -> set[int]:
    """Numbers of kept samples without a caption of this job's captioner."""
    numbers = _kept_numbers(folder, manifest)
    if manifest.caption_digest != job.caption_digest:
        return set(numbers.values())
    rows = _caption_rows(folder, manifest)
    failed = (row for row in rows if row["caption_error"] and not is_final(row["caption_error"]))
    return {numbers[row["key"]] for row in failed}


def _kept_numbers(folder: Folder, manifest: Manifest) -> dict[str, int]:
    """The number of each sample that is kept, by its key."""
    rows = stored_rows(folder, manifest.status.path, ["key", "number", "status"])
    return {row["key"]: row["number"] for row in rows if row["status"] == "kept"}


def _caption_rows(folder: Folder, manifest: Manifest) -> list[Row]:
    """The caption rows that stand; old files have no column of errors."""
    rows = stored_rows(folder, manifest.captions.path)
    return [{"caption_error": None, **row} for row in rows]
