"""A run trains on the whole dataset, or on one of its resolutions."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.latents.dataset import LatentDataset, Split
from data_prep.latents.records import Bucket, LatentDatasetError
from flow.aspects import ASPECTS, area_of, size_of
from flow.aspects import ratio_of as ratio
from tests.training.world import write_dataset
from training.data.batch_sampler import BatchSampler
from training.data.latents import is_of, open_latents
from training.sections import BatchConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and images of 64x64 pixels, which is 48p, and clips of 96x96, 72p."""
    folder = tmp_path_factory.mktemp("latents") / "data"
    return write_dataset(folder, clips=40, images=20, more_buckets={(96, 96): 40})


def ids_by_bucket(dataset: LatentDataset) -> dict[Bucket, list[str]]:
    return {bucket: list(ids) for bucket, ids in dataset.buckets.items()}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_resolution_takes_its_own_buckets_and_leaves_none_of_their_samples(
    root: Path, split: Split
) -> None:
    whole = ids_by_bucket(LatentDataset(root, split))
    parts = [ids_by_bucket(open_latents(root, split, name)) for name in ("48p", "72p")]
    assert parts[0] | parts[1] == whole
    assert {bucket[1:] for bucket in parts[0]} == {(64, 64)}
    assert {bucket[1:] for bucket in parts[1]} == {(96, 96)}
    assert ids_by_bucket(open_latents(root, split)) == whole


def test_batches_of_one_resolution_are_those_of_its_buckets_alone(root: Path) -> None:
    config = BatchConfig(batch_size=8, image_batch_size=8, image_ratio=0.5, resolution="72p")
    dataset = open_latents(root, "train", config.resolution)
    sampler = BatchSampler(dataset.buckets, config, seed=0)
    plans = [sampler.plan(step) for step in range(12)]
    # It has no images, so its clips' first frames are taken for them.
    assert {plan.mode for plan in plans} == {"image", "video"}
    assert {plan.bucket for plan in plans} == {Bucket(9, 96, 96)}
    assert len(dataset) == sum(map(len, dataset.buckets.values())) > 0


def test_a_resolution_that_is_not_there_is_refused_with_those_that_are(root: Path) -> None:
    with pytest.raises(LatentDatasetError, match=r"resolution is 480p, but .* 9x96x96") as caught:
        open_latents(root, "train", "480p")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="'480' is not ROWSp, such as 480p"):
        BatchConfig(resolution="480")


@pytest.mark.parametrize("space", [8, 16])
def test_every_bucket_of_a_resolution_is_of_it_and_of_no_other(space: int) -> None:
    names = ("240p", "384p", "480p", "720p")
    for name in names:
        for aspect in ASPECTS:
            bucket = Bucket(81, *size_of(ratio(aspect), area_of(name), space))
            assert [other for other in names if is_of(bucket, other)] == [name]
