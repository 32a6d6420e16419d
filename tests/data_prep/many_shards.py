"""A dataset of as many shards as are asked for, in a store, and what is done with one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.index import LatentIndex
from data_prep.latents.inspection import inspect_dataset
from data_prep.ledger.commit import remove_leftovers
from data_prep.ledger.job import Digests, jobs_left
from data_prep.ledger.manifest import Manifests, fold_manifests, read_manifest
from data_prep.ledger.manifest_file import ManifestRow, write_manifest_file
from data_prep.sources.find import fingerprint
from data_prep.storage.store import open_folder
from tests.data_prep.latents.test_dataset import write_dataset
from tests.data_prep.s3_server import Store

RECORDS = 6
"""Of a shard."""


def upload_shards(store: Store, root: Path, count: int) -> str:
    """A dataset of so many shards, all of the same files, with samples kept, dropped and failed."""
    write_dataset(root, count=RECORDS)
    folder = open_folder(root)
    (root / "source.tar").write_bytes(b"not read")
    first = read_manifest(folder, "s")
    assert first is not None
    rows = []
    for number in range(count):
        manifest = replace(
            first,
            shard=f"{number:05d}",
            source=str(root / "source.tar"),
            fingerprint=fingerprint(str(root / "source.tar")),
            caption_digest="bb",
            counts={"kept": RECORDS, "dropped": 2, "failed": 1},
            reasons={"too_short": 2, "empty_video": 1},
            dropped={"too_short": 2},
        )
        rows.append(ManifestRow(manifest.head, manifest.to_json()))
    write_manifest_file(folder, rows)
    folder.remove("manifests/s.json")
    LatentIndex.open(root)
    for path in root.rglob("*"):
        if path.is_file():
            store.upload(path, f"{root.name}/{path.relative_to(root)}")
    return store.uri(root.name)


def open_it(uri: str, root: Path) -> None:
    """Open it as training does."""
    assert len(LatentDataset(uri, "all")) == RECORDS * len(Manifests(open_folder(root)).shards())


def inspect_it(uri: str, _: Path) -> None:
    """Its figures, with few records looked into."""
    found = inspect_dataset(uri, records=8)
    assert found.counts["kept"] == RECORDS * found.shards
    assert found.reasons == {
        ("dropped", "too_short"): 2 * found.shards,
        ("failed", "empty_video"): found.shards,
    }


def resume_it(uri: str, root: Path) -> None:
    """What a run asks of it that has nothing left to do; its sources are on the disk."""
    folder = open_folder(uri)
    remove_leftovers(folder)
    fold_manifests(folder)
    sources = {name: str(root / "source.tar") for name in Manifests(open_folder(root)).shards()}
    assert jobs_left(folder, sources, Digests("d", "bb", "", "")) == []


Act = Callable[[str, Path], None]
ACTS: dict[str, Act] = {
    "open it, for the first time here": open_it,
    "open it again": open_it,
    "inspect it": inspect_it,
    "resume it": resume_it,
}
"""In this order."""


def requests_of(store: Store, root: Path, count: int) -> dict[str, Counter[str]]:
    """What is asked of a store by each act on a dataset of so many shards."""
    uri = upload_shards(store, root, count)
    asked = {}
    for name, act in ACTS.items():
        before = store.gate.requests.copy()
        act(uri, root)
        asked[name] = store.gate.requests - before
    return asked
