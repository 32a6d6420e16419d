"""What is to be done with an input shard, what decides its output, and which shards are left.

Knows nothing of samples, or of how a shard is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from data_prep.ledger.manifest import Manifest, Manifests, read_manifest
from data_prep.sources.find import content_sha256, fingerprint
from data_prep.storage.folder import Folder, map_at_once
from data_prep.storage.location import is_uri
from flowreel.values import digest_of

_STORE_REQUESTS = 16
"""How many shards in a store are looked at at once."""


class Digests(NamedTuple):
    """What the settings of a run decide, each as one digest."""

    latent: str
    """Status and latents: a shard with another one is made anew."""
    caption: str
    """The synthetic captions."""
    outcome: str
    """Status and latents of a sample that passes the metadata filters."""
    encode: str
    """Latents, given the frames."""


@dataclass(frozen=True)
class ShardJob:
    """An input shard and what decides its output. Small and picklable.

    >>> job = ShardJob("00000", "/data/00000.tar", "size:9 mtime_ns:1", "aa", "bb")
    >>> job.digest == replace(job, source="/elsewhere/00000.tar").digest
    True
    >>> job.digest == replace(job, caption_digest="cc").digest
    False
    """

    name: str
    source: str
    fingerprint: str
    latent_digest: str
    caption_digest: str
    outcome_digest: str = ""
    encode_digest: str = ""
    standing: bool = False
    """Whether a manifest of other input or settings stands (`data_prep.ledger.reuse`)."""
    encode: bool = True
    """False if the latents stand and only captions are missing (`data_prep.ledger.recaption`)."""
    replaces: str = ""
    """The job whose captions a captions-only job replaces: so each try is a job of its own."""

    @property
    def digest(self) -> str:
        """Names the staging folder: samples of other inputs or settings never mix with it."""
        values = [self.fingerprint, self.latent_digest, self.caption_digest, str(self.encode)]
        values += [self.replaces] if self.replaces else []
        return digest_of({"job": values})

    def captions_only(self, manifest: Manifest) -> ShardJob:
        """The job as one of captions only, for latents of which this manifest stands."""
        return replace(self, encode=False, replaces=manifest.job)

    def is_committed(self, folder: Folder) -> bool:
        """Whether the manifest of exactly this job stands."""
        manifest = read_manifest(folder, self.name)
        return manifest is not None and manifest.job == self.digest


def jobs_left(
    folder: Folder, sources: Mapping[str, str], digests: Digests, *, verify: bool = False
) -> list[ShardJob]:
    """What is left to do for shards, given by name and source. Raises as `job_left`."""
    manifests = Manifests(folder)

    def job(name: str) -> ShardJob | None:
        return job_left(manifests, name, sources[name], digests, verify=verify)

    in_stores = any(is_uri(source) for source in sources.values())
    threads = max(folder.threads, _STORE_REQUESTS if in_stores else 1)
    jobs = map_at_once(job, list(sources), threads)
    return [job for job in jobs if job is not None]


def job_left(
    manifests: Manifests, name: str, source: str, digests: Digests, *, verify: bool = False
) -> ShardJob | None:
    """What is left to do for a shard; None if its manifest stands for the same input and settings.

    The input is the same if its size and modification time are, or with `verify` if its content
    is, whatever its time says.

    Raises:
        ShardError: the shard is not there.
        DamagedManifest: its manifest cannot be read.
    """
    job = ShardJob(
        name=name,
        source=source,
        fingerprint=fingerprint(source),
        latent_digest=digests.latent,
        caption_digest=digests.caption,
        outcome_digest=digests.outcome,
        encode_digest=digests.encode,
    )
    manifest = manifests.get(name)
    if manifest is None:
        return job
    if manifest.latent_digest != digests.latent or not _is_same_input(manifest, job, verify):
        return replace(job, standing=True)
    if manifest.caption_digest != digests.caption:
        return replace(job, standing=True).captions_only(manifest)
    return None


def _is_same_input(manifest: Manifest, job: ShardJob, verify: bool) -> bool:
    if verify:
        return manifest.sha256 == content_sha256(job.source)
    return manifest.fingerprint == job.fingerprint
