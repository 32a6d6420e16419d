"""What a latent dataset holds: counts, sizes, lengths, latent statistics, and pictures of what was kept and what was not.

Reads manifests, the index and a bounded number of records; nothing is written. Knows nothing of tables or pages.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.duplicates import MASK_NAME, masked_ids
from data_prep.latents.index import INDEX_NAME, manifests
from data_prep.latents.records import (
    Bucket,
    DatasetInfo,
    LatentRecord,
)
from data_prep.sources.samples import (
    IMAGE_SUFFIXES,
    ShardError,
    read_shard,
)
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder
from media.errors import MediaError
from media.read import VideoReader
from media.write import decode_image

if TYPE_CHECKING:
    from flow.codec import VideoCodec

log = logging.getLogger("flowreel.prepare")

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
KINDS = ("latents", "captions", "status", "manifests", "staging", INDEX_NAME, MASK_NAME)
_DECODED_PIXELS = 17 * 256 * 256
_SHARDS_OPENED = 8
_STATUS_FILES = 64


@dataclass(frozen=True)
class BucketFigures:
    """One bucket of the dataset."""

    bucket: Bucket
    clips: int
    seconds: float
    """Length of all its clips together; 0 for images."""
    size_bytes: int


@dataclass(frozen=True)
class Channels:
    """Latent statistics per channel beside those the codec declares, in codec units; [C] each."""

    mean: Floats
    std: Floats
    codec_mean: Floats
    codec_std: Floats
    records: int
    """How many records they were measured on."""

    @property
    def shift(self) -> Floats:
        """(mean − codec's mean) / codec's std: 0 where they agree."""
        return (self.mean - self.codec_mean) / self.codec_std

    @property
    def scale(self) -> Floats:
        """std / codec's std: 1 where they agree."""
        return self.std / self.codec_std


@dataclass(frozen=True)
class Inspection:
    """What `inspect_dataset` found."""

    root: str
    """Where it lies, for people."""
    info: DatasetInfo
    counts: dict[str, int]
    """Samples by status."""
    reasons: dict[tuple[str, str], int]
    """Samples not kept by (status, reason)."""
    shards: int
    truncated: int
    """Shards that end too early."""
    buckets: list[BucketFigures]
    caption_words: dict[str, list[int]]
    """Words of the original and of the synthetic captions, a number a caption (of a sample of the clips)."""
    channels: Channels | None
    """None where nothing was kept."""
    duplicates: int
    """Kept records that the mask of near-duplicates hides from training."""
    size_bytes: dict[str, int]
    """By kind of file."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def inspect_dataset(root: Location, *, records: int = 256) -> Inspection:
    """Figures of the dataset in `root`; `records` bounds how many latents and captions are read.

    Raises:
        LatentDatasetError: no dataset there, or a damaged one.
    """
    dataset = LatentDataset(root, "all", duplicates="keep")
    counts: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    rows: Counter[Bucket] = Counter()
    sizes: Counter[Bucket] = Counter()
    shards, truncated = 0, 0
    folder = dataset.folder
    for manifest in manifests(folder):
        shards, truncated = shards + 1, truncated + bool(manifest.get("truncated"))
        counts.update(manifest["counts"])
        for entry in manifest["files"]:
            if entry["kind"] == "latents":
                bucket = Bucket.parse(entry["bucket"])
                rows[bucket] += entry["rows"]
                sizes[bucket] += folder.size(entry["path"])
            elif entry["kind"] == "status" and set(manifest["counts"]) - {"kept"}:
                with folder.open(entry["path"]) as source:
                    table = pq.read_table(source, columns=["status", "reason"])
                pairs = zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)
                reasons.update(pair for pair in pairs if pair[0] != "kept")
    ids = sampled_ids(dataset, records)
    buckets = [
        BucketFigures(
            bucket,
            rows[bucket],
            rows[bucket] * bucket.frames / dataset.info.fps if bucket.frames > 1 else 0.0,
            sizes[bucket],
        )
        for bucket in sorted(rows)
    ]
    texts = [dataset.captions(name) for name in ids]
    return Inspection(
        root=folder.where(),
        info=dataset.info,
        counts=dict(sorted(counts.items())),
        reasons=dict(sorted(reasons.items())),
        shards=shards,
        truncated=truncated,
        buckets=buckets,
        caption_words={
            kind: [len(text[place].split()) for text in texts]
            for place, kind in enumerate(("original", "synthetic"))
        },
        channels=_channels(dataset, ids) if ids else None,
        duplicates=len(masked_ids(folder)),
        size_bytes={kind: folder.size(kind) for kind in KINDS},
    )


def sampled_ids(dataset: LatentDataset, count: int) -> list[str]:
    """Ids spread evenly over every bucket, the same ones each time."""
    total = max(1, sum(len(ids) for ids in dataset.buckets.values()))
    chosen = []
    for ids in dataset.buckets.values():
        share = min(len(ids), max(1, round(count * len(ids) / total)))
        chosen += [ids[i] for i in np.linspace(0, len(ids) - 1, share).round().astype(int)]
    return list(dict.fromkeys(chosen))


def _channels(dataset: LatentDataset, ids: Iterable[str]) -> Channels:
    """Mean and standard deviation over all values of a channel, every record of the same weight."""
    means, squares = [], []
    for name in ids:
        mean_TCHW = dataset.get(name).mean.astype(np.float64)
        means.append(mean_TCHW.mean(axis=(0, 2, 3)))
        squares.append((mean_TCHW**2).mean(axis=(0, 2, 3)))
    mean = np.mean(means, axis=0)
    variance = np.maximum(np.mean(squares, axis=0) - mean**2, 0.0)
    convention = dataset.info.convention
    own = np.asarray(convention.mean), np.asarray(convention.std)
    return Channels(mean, np.sqrt(variance), *own, len(means))


@dataclass(frozen=True)
class Picture:
    """A thumbnail, and what is said beside it."""

    key: str
    shard: str
    frames: Frames | None
    """uint8 [T, H, W, 3]; None where nothing can be shown."""
    captions: tuple[str, str] = ("", "")
    """Original and synthetic; kept clips only."""
    status: str = "kept"
    reason: str = ""
    detail: str = ""


def kept_pictures(root: Location, codec: VideoCodec, count: int) -> list[Picture]:
    """Clips decoded back from their latents: what training will see.

    Small ones whole; of larger ones the first frame, since a large codec takes minutes a clip without a GPU.

    Raises:
        LatentDatasetError: the latents are of another codec.
    """
    from data_prep.latents.records import LatentDatasetError

    dataset = LatentDataset(root, "all")
    if codec.digest != dataset.info.codec_digest:
        raise LatentDatasetError(
            f"the latents in {root} were made by codec {dataset.info.codec_digest}, this one is {codec.digest}; "
            "give the codec that made them (--codec)"
        )
    pictures = []
    for name in sampled_ids(dataset, count)[:count]:
        record = dataset.get(name)
        frames = _decoded(record, codec)
        pictures.append(Picture(record.key, name.partition("/")[0], frames, dataset.captions(name)))
    return pictures


def _decoded(record: LatentRecord, codec: VideoCodec) -> Frames:
    """uint8 [T, H, W, 3] of a record's posterior mean."""
    import torch

    bucket = record.bucket
    small = bucket.frames * bucket.height * bucket.width <= _DECODED_PIXELS
    mean_TCHW = record.mean if small else record.mean[:1]
    mean_BTCHW = torch.from_numpy(mean_TCHW.astype(np.float32))[None]
    none = torch.zeros_like(mean_BTCHW)
    x_BTCHW = codec.convention.to_model(mean_BTCHW, none, none)
    return codec.decode(x_BTCHW)[0].cpu().numpy()


def dropped_pictures(root: Location, count: int) -> list[Picture]:
    """Samples that were not kept, every reason in turn, with a frame of their source where it can still be read.

    They have no latents, so their shards are opened again: at most eight of them, and only as far as needed. What cannot be shown
    (a shard that is gone, a video that nobody can decode) has a reason all the same.
    """
    folder = open_folder(root)
    by_reason: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
    for manifest in islice((m for m in manifests(folder) if _lost(m)), _STATUS_FILES):
        for entry in manifest["files"]:
            if entry["kind"] == "status":
                with folder.open(entry["path"]) as source:
                    table = pq.read_table(source)
                for row in table.to_pylist():
                    if row["status"] != "kept":
                        rows = by_reason.setdefault((row["status"], row["reason"]), [])
                        rows.append((row, manifest["source"]))
    chosen: list[tuple[dict[str, Any], str]] = []
    queues = [iter(rows) for _, rows in sorted(by_reason.items())]
    while queues and len(chosen) < count:
        for queue in list(queues):
            row = next(queue, None)
            if row is None:
                queues.remove(queue)
            elif len(chosen) < count:
                chosen.append(row)
    frames = _source_frames(chosen)
    return [
        Picture(
            row["key"],
            row["shard"],
            frames.get((source, row["number"])),
            status=row["status"],
            reason=row["reason"],
            detail=row["detail"],
        )
        for row, source in sorted(chosen, key=lambda c: (c[0]["status"], c[0]["reason"]))
    ]


def _lost(manifest: dict[str, Any]) -> bool:
    return bool(set(manifest["counts"]) - {"kept"})


def _source_frames(rows: list[tuple[dict[str, Any], str]]) -> dict[tuple[str, int], Frames]:
    """(source, number) → the first frame [1, H, W, 3] of those samples that can be read."""
    wanted: dict[str, set[int]] = {}
    for row, source in rows:
        wanted.setdefault(source, set()).add(row["number"])
    found: dict[tuple[str, int], Frames] = {}
    with VideoReader() as reader:
        for source, numbers in islice(wanted.items(), _SHARDS_OPENED):
            try:
                for sample in read_shard(source):
                    if sample.number in numbers and sample.media:
                        frame = _first_frame(sample.media, sample.suffix, reader)
                        if frame is not None:
                            found[source, sample.number] = frame
                    if sample.number >= max(numbers):
                        break
            except ShardError as error:
                log.warning("no pictures of %s: %s", source, error)
    return found


def _first_frame(media: bytes, suffix: str, reader: VideoReader) -> Frames | None:
    """The first frame, or None where that is why the sample was not kept."""
    try:
        if suffix in IMAGE_SUFFIXES:
            return decode_image(media)[None]
        return reader.read(media, choose=lambda _: [0], deadline_s=10.0).frames
    except MediaError:
        return None
