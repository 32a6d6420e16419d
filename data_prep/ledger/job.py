"""What is to be done with one input shard, and what decides what comes of it. Knows no files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from data_prep.config import digest_of


class Digests(NamedTuple):
    """What the settings of a run decide, each as one digest."""

    latent: str
    """Status and latents: where it differs, a shard is made anew."""
    caption: str
    outcome: str
    """The same as `latent` for a sample that passes the metadata filters."""
    encode: str
    """Latents, given the frames."""


@dataclass(frozen=True)
class ShardJob:
    """An input shard and what decides its output. Small and picklable."""

    name: str
    source: str
    fingerprint: str
    latent_digest: str
    caption_digest: str
    outcome_digest: str = ""
    encode_digest: str = ""
    standing: bool = False
    """Whether a manifest stands, of other input or settings: some of it may do (`data_prep.ledger.reuse`)."""
    encode: bool = True
    """False where the latents stand and only captions are missing (`data_prep.ledger.recaption`)."""
    replaces: str = ""
    """Of a captions-only job: the job whose captions it replaces, so that each try is a job of its own."""

    @property
    def digest(self) -> str:
        """Names the staging folder: other inputs or settings never mix with it."""
        values = [self.fingerprint, self.latent_digest, self.caption_digest, str(self.encode)]
        values += [self.replaces] if self.replaces else []
        return digest_of({"job": values})


def caption_job(job: ShardJob, done: dict[str, Any]) -> ShardJob:
    """The job as one of captions only, given the manifest that stands."""
    return replace(job, encode=False, replaces=done["job"])
