"""An export is read by the webdataset library, is the same twice, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.export import ExportError, export_webdataset
from data_prep.latents.records import Bucket
from tests.data_prep.latents.test_dataset import write_dataset


def read_back(paths: list[Path]) -> dict[str, dict]:
    import webdataset

    urls = [str(path) for path in paths]
    samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return {sample["json"]["id"]: sample for sample in samples}


def test_webdataset_reads_back_what_was_exported(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in")
    paths = export_webdataset(tmp_path / "in", tmp_path / "out", shard_bytes=100_000)
    assert len(paths) > len({path.name.partition("-")[0] for path in paths}) == 2
    samples = read_back(paths)
    dataset = LatentDataset(tmp_path / "in", "all")
    assert sorted(samples) == sorted(i for ids in dataset.buckets.values() for i in ids)
    for name, sample in samples.items():
        record = dataset.get(name)
        np.testing.assert_array_equal(sample["mean.npy"], record.mean)
        np.testing.assert_array_equal(sample["logvar.npy"], record.logvar)
        assert sample["mean.npy"].dtype == np.float16
        assert (sample["txt"], sample["json"]["synthetic_caption"]) == dataset.captions(name)
        assert Bucket.parse(sample["json"]["bucket"]) == record.bucket


def test_an_export_is_the_same_twice_and_resumes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in", logvar=False)
    first = export_webdataset(tmp_path / "in", tmp_path / "a", shard_bytes=100_000)
    contents = [path.read_bytes() for path in first]
    first[1].unlink()
    inode = first[0].stat().st_ino
    again = export_webdataset(tmp_path / "in", tmp_path / "a", shard_bytes=100_000)
    assert [path.read_bytes() for path in again] == contents
    assert first[0].stat().st_ino == inode
    other = export_webdataset(tmp_path / "in", tmp_path / "b", shard_bytes=100_000)
    assert [path.read_bytes() for path in other] == contents
    assert "logvar.npy" not in next(iter(read_back(first).values()))


def test_a_folder_of_another_export_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in")
    export_webdataset(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ExportError, match="another dataset, split or tar size"):
        export_webdataset(tmp_path / "in", tmp_path / "out", split="train")
