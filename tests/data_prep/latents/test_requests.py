"""A store's dataset of many shards is opened, resumed and inspected by as few requests as of few.

Only listings grow, by one page for a thousand names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

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


def upload_shards(store: Store, root: Path, count: int) -> str:
    """A dataset of so many shards, all of the same files, with samples kept, dropped and failed."""
    write_dataset(root, count=6)
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
            counts={"kept": 6, "dropped": 2, "failed": 1},
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


def open_it(uri: str, _: Path) -> None:
    assert len(LatentDataset(uri, "all")) >= 600


def inspect_it(uri: str, _: Path) -> None:
    found = inspect_dataset(uri, records=8)
    assert found.reasons == {
        ("dropped", "too_short"): 2 * found.shards,
        ("failed", "empty_video"): found.shards,
    }
    assert found.counts["kept"] == 6 * found.shards


def resume_it(uri: str, root: Path) -> None:
    folder = open_folder(uri)
    remove_leftovers(folder)
    fold_manifests(folder)
    sources = {name: str(root / "source.tar") for name in Manifests(open_folder(root)).shards()}
    assert jobs_left(folder, sources, Digests("d", "bb", "", "")) == []


def asked_by(store: Store, act: Callable[[str, Path], None], uri: str, root: Path) -> Counter[str]:
    before = store.gate.requests.copy()
    act(uri, root)
    return store.gate.requests - before


def test_requests_do_not_grow_with_the_shards(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: dict[str, list[Counter[str]]] = {}
    for count in (100, 900):
        root = tmp_path / f"shards{count}"
        uri = upload_shards(store, root, count)
        for act in (open_it, open_it, inspect_it, resume_it):
            asked.setdefault(act.__name__, []).append(asked_by(store, act, uri, root))
    for name, requests in asked.items():
        half = len(requests) // 2
        assert requests[:half] == requests[half:], name
        assert requests[0].total() < (100 if name == "inspect_it" else 20), name
