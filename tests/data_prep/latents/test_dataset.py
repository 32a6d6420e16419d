"""What is written is what is loaded, in the order asked for, split by key."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.records import (
    CAPTION_SCHEMA,
    LATENT_SCHEMA,
    Bucket,
    DatasetInfo,
    LatentDatasetError,
    LatentRecord,
    is_held_out,
    write_rows,
)
from flow.codec import LatentConvention
from tests.data_prep.handmade import captions_entry, latents_entry, write_handmade_manifest


def moments(number: int, frames: int, side: int = 2) -> np.ndarray:
    rng = np.random.default_rng([number, frames])
    return rng.normal(size=((frames - 1) // 4 + 1, 3, side, side)).astype(np.float16)


def write_dataset(root: Path, *, count: int = 60, logvar: bool = True, side: int = 2) -> list[str]:
    """One shard with clips and images; returns the keys."""
    info = DatasetInfo("c0dec", LatentConvention((0.0,) * 3, (1.0,) * 3), 8.0, (), 3, "d")
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(info.to_dict()))
    keys = [f"k{n:03d}" for n in range(count)]
    entries = []
    for bucket, own in ((Bucket(5, 32, 32), keys[::2]), (Bucket(1, 32, 32), keys[1::2])):
        rows = [
            LatentRecord(
                key=key,
                window=0,
                number=keys.index(key),
                bucket=bucket,
                fps=8.0,
                pts_s=[0.0] * bucket.frames,
                mean=moments(keys.index(key), bucket.frames, side),
                logvar=moments(1000 + keys.index(key), bucket.frames, side) if logvar else None,
                codec="c0dec",
            ).row()
            for key in own
        ]
        path = root / "latents" / f"s.{bucket}.parquet"
        path.parent.mkdir(exist_ok=True)
        assert write_rows(path, rows, LATENT_SCHEMA) == len(own)
        entries.append(latents_entry(f"latents/{path.name}", str(bucket)))
    captions = [
        {"key": k, "window": 0, "caption": f"C {k}", "synthetic": f"S {k}", "captioner": "m"}
        for k in keys
    ]
    (root / "captions").mkdir(exist_ok=True)
    write_rows(root / "captions" / "s.parquet", captions, CAPTION_SCHEMA)
    write_handmade_manifest(root, "s", "d", *entries, captions_entry("captions/s.parquet"))
    return keys


def test_records_come_back_exactly_in_the_order_asked_for(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = LatentDataset(tmp_path, "all")
    ids = dataset.buckets[Bucket(5, 32, 32)]
    assert ids == sorted(ids)
    assert len(ids) == 30
    chosen = [ids[7], ids[0], ids[29]]
    batch = dataset.load(chosen)
    assert batch.mean_BTCHW.dtype == torch.float32
    assert batch.mean_BTCHW.shape == (3, 2, 3, 2, 2)
    for place, number in enumerate((14, 0, 58)):
        np.testing.assert_array_equal(batch.mean_BTCHW[place], moments(number, 5))
        np.testing.assert_array_equal(batch.logvar_BTCHW[place], moments(1000 + number, 5))
    assert batch.captions == ["C k014", "C k000", "C k058"]
    assert batch.synthetic[0] == "S k014"
    assert batch.ids == chosen


def test_splits_are_disjoint_complete_and_by_key(tmp_path: Path) -> None:
    keys = write_dataset(tmp_path, count=400)
    ids = {
        split: {i for ids in LatentDataset(tmp_path, split).buckets.values() for i in ids}
        for split in ("train", "held_out", "all")
    }
    assert ids["train"] | ids["held_out"] == ids["all"]
    assert not ids["train"] & ids["held_out"]
    assert {i.split("/")[1] for i in ids["held_out"]} == {k for k in keys if is_held_out(k)}
    assert 10 <= len(ids["held_out"]) <= 45


def test_missing_log_variances_are_no_noise(tmp_path: Path) -> None:
    write_dataset(tmp_path, logvar=False)
    dataset = LatentDataset(tmp_path, "all")
    batch = dataset.load(dataset.buckets[Bucket(1, 32, 32)][:2])
    assert float(torch.exp(0.5 * batch.logvar_BTCHW).max()) < 1e-6


def test_a_dataset_travels_to_other_processes_while_open(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = LatentDataset(tmp_path, "all")
    ids = dataset.buckets[Bucket(5, 32, 32)][:3]
    before = dataset.load(ids)
    other = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(other.load(ids).mean_BTCHW, before.mean_BTCHW, rtol=0, atol=0)


def test_row_groups_are_small_and_all_are_reached(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_dataset(tmp_path, count=400)
    with pq.ParquetFile(tmp_path / "latents" / "s.5x32x32.parquet") as file:
        assert file.num_row_groups == 4
    dataset = LatentDataset(tmp_path, "all", cached_groups=1)
    for name in dataset.buckets[Bucket(5, 32, 32)][::-37]:
        number = int(name.split("/")[1][1:])
        np.testing.assert_array_equal(dataset.load([name]).mean_BTCHW[0], moments(number, 5))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatentDatasetError, match=r"dataset\.json is missing"):
        LatentDataset(tmp_path / "none")
    write_dataset(tmp_path)
    dataset = LatentDataset(tmp_path, "all")
    with pytest.raises(LatentDatasetError, match="no record 's/x/0'"):
        dataset.load(["s/x/0"])
    with pytest.raises(LatentDatasetError, match="at least one"):
        dataset.load([])
    with pytest.raises(LatentDatasetError, match="one bucket"):
        dataset.load([ids[0] for ids in dataset.buckets.values()])
    with pytest.raises(LatentDatasetError, match="split is 'test'"):
        LatentDataset(tmp_path, "test")  # type: ignore[arg-type]


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(LatentDatasetError, match="version 99"):
        LatentDataset(tmp_path)


def test_shards_without_a_manifest_are_not_seen(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "manifests" / "s.json").unlink()
    assert len(LatentDataset(tmp_path, "all")) == 0


def test_buckets_are_written_as_they_are_read() -> None:
    assert Bucket.parse(str(Bucket(81, 480, 832))) == Bucket(81, 480, 832)
    for text in ("81x480", "axbxc", "81x480x832x1", "-1x2x3"):
        with pytest.raises(LatentDatasetError, match="no bucket"):
            Bucket.parse(text)
