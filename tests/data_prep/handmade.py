"""Manifests written by hand, for datasets that no run has prepared."""

from __future__ import annotations

from pathlib import Path

from data_prep.ledger.manifest import FileEntry, Manifest, write_manifest
from data_prep.storage.store import open_folder


def latents_entry(path: str, bucket: str) -> FileEntry:
    return FileEntry("latents", path, rows=0, sha256="", bucket=bucket)


def captions_entry(path: str) -> FileEntry:
    return FileEntry("captions", path, rows=0, sha256="", failures={})


def write_handmade_manifest(
    root: Path, shard: str, latent_digest: str, *entries: FileEntry
) -> None:
    """A manifest that names these files, as readers of latents and captions want them."""
    status = FileEntry("status", f"status/{shard}.parquet", rows=0, sha256="")
    manifest = Manifest(
        shard=shard,
        source=f"{shard}.tar",
        fingerprint="",
        job="",
        latent_digest=latent_digest,
        caption_digest="",
        num_samples=0,
        truncated=False,
        ignored_members=0,
        error="",
        sha256="",
        counts={},
        reasons={},
        files=(status, *entries),
    )
    write_manifest(open_folder(root), manifest)
