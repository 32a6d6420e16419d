"""The latents that a run trains on: those of a dataset, or of one of its resolutions.

Knows nothing of models or Ray.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.latents.dataset import LatentDataset, Split
from data_prep.latents.records import Bucket, LatentDatasetError
from flow.aspects import area_of

TOLERANCE = 1.1
"""An area is a resolution's up to so many times larger or smaller: sides are rounded."""


def is_of(bucket: Bucket, resolution: str) -> bool:
    """Whether a bucket's area is within a tenth of a resolution's.

    >>> [is_of(Bucket(81, 480, 848), name) for name in ("384p", "480p")]
    [False, True]
    """
    share = bucket.height * bucket.width / area_of(resolution)
    return 1 / TOLERANCE <= share <= TOLERANCE


def open_latents(root: str | Path, split: Split, resolution: str | None = None) -> LatentDataset:
    """A split of the dataset at `root`, with the buckets of one resolution alone if it is named.

    Raises:
        LatentDatasetError: no dataset there, or it holds no bucket of that resolution.
        StorageError: the disk or store fails.
    """
    dataset = LatentDataset(root, split)
    if resolution is None:
        return dataset
    held = sorted(dataset.info.buckets)
    if not any(is_of(bucket, resolution) for bucket in held):
        raise LatentDatasetError(
            f"train.batches.resolution is {resolution}, but {dataset.folder.where()} holds "
            f"{', '.join(map(str, held))} (frames x height x width); name one that it holds, "
            "leave it out, or prepare the shards in that resolution"
        )
    dataset.buckets = {b: ids for b, ids in dataset.buckets.items() if is_of(b, resolution)}
    return dataset
