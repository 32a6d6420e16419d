"""Captions of shards whose latents stand: which samples want one, and the commit that gives it.

The clips are decoded again from their source shards, the same windows by the same settings; latent
and status files are not touched. A shard's caption file is replaced and its manifest rewritten last,
so that a kill leaves the old captions or the new ones. Captions that stand from the same captioner
are not written again: only missing ones are. Knows nothing of Ray or of captioners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.config import PrepareConfig
from data_prep.latents.records import read_info_values
from data_prep.ledger.job import ShardJob, caption_job
from data_prep.ledger.ledger import Ledger, LedgerError
from data_prep.sources.find import (
    content_sha256,
    fingerprint,
    name_shards,
)
from data_prep.sources.samples import ShardError
from data_prep.storage.location import Location


class SourceGone(LedgerError):
    """The source shards that the captions need are not there, or not as they were."""


@dataclass(frozen=True)
class CaptionPlan:
    """What a captions-only run has before it."""

    names: tuple[str, ...]
    """Prepared shards that were asked for."""
    jobs: tuple[ShardJob, ...]
    """Those with captions to write."""
    unprepared: tuple[str, ...]
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
    ledger = Ledger(out)
    info = read_info_values(out)
    settings = info.get("settings", {})
    # The codec is not used, so it need not be at hand.
    ledger.check_settings({**config.latent_settings(), "codec": settings.get("codec")})
    if shards is None:
        standing = (m for m in ledger.manifests() if m["latent_digest"] == info["prepare_digest"])
        named = {m["shard"]: str(m["source"]) for m in standing}
    else:
        named = name_shards(shards)
    digest = config.caption_digest()
    jobs, prepared, unprepared, gone = [], [], [], []
    for name, source in sorted(named.items()):
        done = ledger.manifest(name)
        if done is None or done["latent_digest"] != info["prepare_digest"]:
            unprepared.append(name)
            continue
        prepared.append(name)
        if done["caption_digest"] == digest and not failed_captions(done):
            ledger.sweep(name)
            continue
        problem, seen = _source_problem(done, source, verify=config.verify)
        if problem:
            gone.append(f"{name}: {problem}")
        jobs.append(caption_job(ShardJob(name, source, seen, done["latent_digest"], digest), done))
    if gone:
        more = f"; and {len(gone) - 5} more" if len(gone) > 5 else ""
        raise SourceGone(
            "captions are made from the clips' frames, and not all source shards are as they were "
            f"prepared ({'; '.join(gone[:5])}{more}). Put them back; or give where they are now as "
            "--shards (with --set prepare.verify=true where only their times differ); where a "
            "shard was meant to change, run prepare without --only"
        )
    return CaptionPlan(tuple(prepared), tuple(jobs), tuple(unprepared))


def _source_problem(done: dict[str, Any], source: str, *, verify: bool) -> tuple[str, str]:
    """(what is wrong with a source shard or "", its fingerprint)."""
    try:
        seen = fingerprint(source)
        if verify and content_sha256(source) != done["sha256"]:
            return f"{source} holds other bytes than were prepared", seen
    except ShardError as error:
        return str(error), ""
    if not verify and seen != done["fingerprint"]:
        return f"{source} has another size or time than was prepared", seen
    return "", seen


def failed_captions(manifest: dict[str, Any]) -> dict[str, int]:
    """Clips of a finished shard without a synthetic caption, by code."""
    return dict(_caption_entry(manifest).get("failed", {}))


def numbers_to_skip(ledger: Ledger, job: ShardJob) -> set[int]:
    """Numbers of the samples that need not be read: staged, or no business of the job's."""
    staged = ledger.staged_numbers(job)
    done = None if job.encode else ledger.manifest(job.name)
    if done is None:
        return staged
    return staged | (set(range(done["num_samples"])) - _wanted(ledger, job, done))


def commit_captions_if_complete(ledger: Ledger, job: ShardJob) -> bool:
    """Write the shard's captions and manifest once every caption that it wants is staged."""
    summary = ledger.summary(job)
    if summary is None:
        return False
    done = _manifest(ledger, job)
    wanted = _wanted(ledger, job, done)
    there = summary["num_samples"]
    if any(number < there for number in wanted - ledger.staged_numbers(job)):
        return False
    keys = {row["key"]: row["number"] for row in _kept(ledger, done)}
    staged = ledger.staged_numbers(job)
    rows = []
    for row in _captions(ledger, done):
        number = keys[row["key"]]
        if number in wanted:
            row = _replaced(row, ledger.staged_rows(job, number) if number in staged else [])
        rows.append(row)
    entry = ledger.write_captions(job.name, rows)
    files = [e for e in done["files"] if e["kind"] != "captions"]
    done |= {"caption_digest": job.caption_digest, "job": job.digest, "files": [*files, entry]}
    ledger.write_manifest(job.name, done)
    ledger.forget(job)
    return True


def _replaced(row: dict[str, Any], fresh: list[dict[str, Any]]) -> dict[str, Any]:
    """A caption row with what this run made of the sample's windows; none: it was not in the shard."""
    for new in fresh:
        if new["status"] == "kept" and new["window"] == row["window"]:
            texts = {name: new[name] for name in ("synthetic", "captioner", "caption_error")}
            return {**row, **texts}
    code, detail = "not_in_shard", "the source shard holds fewer samples than were prepared"
    if fresh:
        code, detail = fresh[0]["reason"] or "no_window", fresh[0]["detail"]
    return {**row, "synthetic": "", "captioner": "", "caption_error": f"{code}: {detail}"}


def _wanted(ledger: Ledger, job: ShardJob, done: dict[str, Any]) -> set[int]:
    """Numbers of kept samples without a caption of this job's captioner."""
    numbers = {row["key"]: row["number"] for row in _kept(ledger, done)}
    if done["caption_digest"] == job.caption_digest:
        missing = {row["key"] for row in _captions(ledger, done) if row["caption_error"]}
        return {numbers[key] for key in missing}
    return set(numbers.values())


def _manifest(ledger: Ledger, job: ShardJob) -> dict[str, Any]:
    done = ledger.manifest(job.name)
    if done is None:
        raise LedgerError(
            f"the manifest of shard {job.name} went away while it was captioned; run again"
        )
    return done


def _kept(ledger: Ledger, done: dict[str, Any]) -> list[dict[str, Any]]:
    path = next(e["path"] for e in done["files"] if e["kind"] == "status")
    rows = ledger.read_rows(path, ["key", "number", "status"])
    return [row for row in rows if row["status"] == "kept"]


def _captions(ledger: Ledger, done: dict[str, Any]) -> list[dict[str, Any]]:
    """The caption rows that stand; files of before there were errors have none."""
    rows = ledger.read_rows(_caption_entry(done)["path"])
    return [{"caption_error": None, **row} for row in rows]


def _caption_entry(done: dict[str, Any]) -> dict[str, Any]:
    return dict(next(e for e in done["files"] if e["kind"] == "captions"))
