"""Manifests written by hand, for datasets that no run has prepared."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.latents.records import FORMAT_VERSION
from data_prep.ledger.manifest import FileEntry, Kind, Manifest, write_manifest
from data_prep.storage.store import open_folder
from flowreel.values import sha256_of


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


def write_keys(
    root: Path, shard: str, ids: dict[str, list[tuple[str, int]]], latent_digest: str = "d"
) -> None:
    """A finished shard that has keys and windows by bucket, and no moments behind them."""
    entries = []
    for kind, rows_by_base in (
        ("latents", {f"{shard}.{bucket}.parquet": rows for bucket, rows in ids.items()}),
        ("captions", {f"{shard}.parquet": [row for rows in ids.values() for row in rows]}),
    ):
        for base, rows in rows_by_base.items():
            path = root / kind / base
            path.parent.mkdir(parents=True, exist_ok=True)
            windows = pa.array([window for _, window in rows], pa.int32())
            keys = pa.array([key for key, _ in rows], pa.string())
            pq.write_table(pa.table({"key": keys, "window": windows}), path, row_group_size=64)
            bucket = base.split(".")[-2] if kind == "latents" else ""
            name = f"{kind}/{base}"
            kinds: tuple[Kind, ...] = ("latents", "captions")
            entries.append(FileEntry(kinds[not bucket], name, len(rows), sha256_of(path), bucket))
    info = {"version": FORMAT_VERSION, "prepare_digest": latent_digest}
    (root / "dataset.json").write_text(json.dumps(info))
    write_handmade_manifest(root, shard, latent_digest, *entries)
