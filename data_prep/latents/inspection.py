"""What a latent dataset holds: figures, and pictures of what was kept and what was not.

Reads manifests, the index and a bounded number of records; nothing is written. Knows nothing of
tables or pages.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.duplicates import MASK_NAME, masked_count
from data_prep.latents.index import current_manifests
from data_prep.latents.index_file import INDEX_NAME
from data_prep.latents.records import (
    Bucket,
    DatasetInfo,
    LatentDatasetError,
    LatentRecord,
    read_info_values,
    stored_rows,
)
from data_prep.ledger.manifest import MANIFESTS
from data_prep.ledger.manifest_file import MANIFEST_FILE
from data_prep.ledger.problems import ShardProblem, problem_of
from data_prep.ledger.staging import STAGING
from data_prep.row import Row
from data_prep.sources.config import IMAGE_SUFFIXES, SourceConfig
from data_prep.sources.listing import ShardError
from data_prep.sources.samples import read_shard
from data_prep.storage.location import Location, StorageError, shown
from data_prep.storage.store import open_folder
from media.errors import MediaError
from media.frames import Frames
from media.read import VideoReader
from media.write import decode_image

if TYPE_CHECKING:
    from flow.codec import VideoCodec

log = logging.getLogger("flowreel.prepare")

Floats = npt.NDArray[np.float64]
KINDS = (
    "latents", "captions", "texts", "status", MANIFESTS, MANIFEST_FILE, STAGING, INDEX_NAME,
    MASK_NAME,
)  # fmt: skip
_DECODED_PIXELS = 17 * 256 * 256
"""Clips of up to so many pixels are decoded whole."""
_SHARDS_OPENED = 8
"""So many source shards are opened for pictures."""
_STATUS_FILES = 64
"""So many status files are read for pictures."""


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
    """The figures of a dataset (`inspect_dataset`)."""

    root: str
    """Where it lies, for people."""
    info: DatasetInfo
    counts: dict[str, int]
    """Samples by status."""
    reasons: dict[tuple[str, str], int]
    """Samples not kept by (status, reason)."""
    shards: int
    shard_problems: list[ShardProblem]
    """Shards of which nothing, or not everything, could be read."""
    unjudged: dict[str, int]
    """Samples that passed a metadata filter because they lack its field (`Manifest.unjudged`)."""
    buckets: list[BucketFigures]
    caption_words: dict[str, list[int]]
    """Words of each original and of each synthetic caption, of some of the clips."""
    channels: Channels | None
    """None if nothing was kept."""
    duplicates: int
    """Kept records that the mask of near-duplicates hides from training."""
    size_bytes: dict[str, int]
    """Bytes by kind of file."""

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def truncated(self) -> int:
        """Shards that end too early."""
        return sum(problem.problem == "truncated" for problem in self.shard_problems)

    @property
    def unreadable(self) -> int:
        """Shards of which nothing could be read."""
        return len(self.shard_problems) - self.truncated


def inspect_dataset(root: Location, *, records: int = 256) -> Inspection:
    """Figures of the dataset in `root`.

    Args:
        root: the folder that `prepare` wrote, a path or URI.
        records: of how many records, at most, latents and captions are read.

    Raises:
        LatentDatasetError: no dataset there, or a damaged one.
    """
    dataset = LatentDataset(root, "all", duplicates="keep")
    counts: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    rows: Counter[Bucket] = Counter()
    sizes: Counter[Bucket] = Counter()
    unjudged: Counter[str] = Counter()
    shards, problems = 0, list[ShardProblem]()
    folder = dataset.folder
    # One listing: a large output has too many files to ask for each.
    file_sizes = {f"latents/{base}": size for base, size in folder.sizes("latents").items()}
    for manifest in current_manifests(folder):
        shards += 1
        if (problem := problem_of(manifest)) is not None:
            problems.append(problem)
        counts.update(manifest.counts)
        unjudged.update(manifest.unjudged or {})
        for entry in manifest.latents:
            bucket = Bucket.parse(entry.bucket)
            rows[bucket] += entry.rows
            sizes[bucket] += file_sizes.get(entry.path, 0)
        lost = manifest.lost
        if lost is not None:
            reasons.update(lost)
            continue
        for row in stored_rows(folder, manifest.status.path, ["status", "reason"]):
            if row["status"] != "kept":
                reasons[row["status"], row["reason"]] += 1
    ids = sampled_ids(dataset, records)
    buckets = [
        BucketFigures(
            bucket,
            rows[bucket],
            0.0 if bucket.is_image else rows[bucket] * bucket.frames / dataset.info.fps,
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
        shard_problems=problems,
        unjudged=dict(sorted(unjudged.items())),
        buckets=buckets,
        caption_words={
            kind: [len(text[place].split()) for text in texts]
            for place, kind in enumerate(("original", "synthetic"))
        },
        channels=_channels(dataset, ids) if ids else None,
        duplicates=masked_count(folder),
        size_bytes={kind: folder.size(kind) for kind in KINDS},
    )


def sampled_ids(dataset: LatentDataset, count: int) -> list[str]:
    """Ids spread evenly over every bucket, the same ones each time."""
    total = max(1, sum(len(ids) for ids in dataset.buckets.values()))
    sample = []
    for ids in dataset.buckets.values():
        share = min(len(ids), max(1, round(count * len(ids) / total)))
        sample += [ids[i] for i in np.linspace(0, len(ids) - 1, share).round().astype(int)]
    return list(dict.fromkeys(sample))


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
    """uint8 [T, H, W, 3]; None if nothing can be shown."""
    captions: tuple[str, str] = ("", "")
    """Original and synthetic; kept clips only."""
    status: str = "kept"
    reason: str = ""
    detail: str = ""


def kept_pictures(root: Location, codec: VideoCodec, count: int) -> list[Picture]:
    """Clips decoded back from their latents: what training will see.

    Small clips are decoded whole. Of larger ones the first frame is shown, because a large codec
    takes minutes a clip without a GPU.

    Raises:
        LatentDatasetError: the latents are of another codec.
    """
    dataset = LatentDataset(root, "all")
    if codec.digest != dataset.info.codec_digest:
        raise LatentDatasetError(
            f"the latents in {root} were made by codec {dataset.info.codec_digest}, this one is "
            f"{codec.digest}; give the codec that made them (--codec)"
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
    """Samples that were not kept, every reason in turn, with a frame of their source if possible.

    They have no latents, so their shards are opened again: at most eight of them, and only as far
    as needed. A sample that cannot be shown, because its shard is gone or because nobody can decode
    it, has its reason all the same.
    """
    folder = open_folder(root)
    by_reason: dict[tuple[str, str], list[_LostSample]] = {}
    incomplete = (m for m in current_manifests(folder) if not m.keeps_all)
    for manifest in islice(incomplete, _STATUS_FILES):
        for row in stored_rows(folder, manifest.status.path):
            if row["status"] != "kept":
                samples = by_reason.setdefault((row["status"], row["reason"]), [])
                samples.append(_LostSample(manifest.source, row))
    samples = list(islice(_in_turn([by_reason[reason] for reason in sorted(by_reason)]), count))
    settings = read_info_values(root).get("settings", {}).get("source", {})
    frames = _source_frames(samples, SourceConfig.model_validate(settings))
    return [
        Picture(
            row["key"],
            row["shard"],
            frames.get((source, row["number"])),
            status=row["status"],
            reason=row["reason"],
            detail=row["detail"],
        )
        for source, row in sorted(samples, key=lambda s: (s.row["status"], s.row["reason"]))
    ]


class _LostSample(NamedTuple):
    """A sample that was not kept: its shard, and its status row."""

    source: str
    row: Row


def _in_turn(queues: Sequence[Sequence[_LostSample]]) -> Iterator[_LostSample]:
    """The first of every queue, then the second of every queue, and so on."""
    for round_of_all in zip_longest(*queues):
        yield from (sample for sample in round_of_all if sample is not None)


def _source_frames(
    samples: Iterable[_LostSample], config: SourceConfig
) -> dict[tuple[str, int], Frames]:
    """The first frame [1, H, W, 3], by source and number, of the samples that can be read."""
    numbers_by_source: dict[str, set[int]] = {}
    for source, row in samples:
        numbers_by_source.setdefault(source, set()).add(row["number"])
    frames: dict[tuple[str, int], Frames] = {}
    with VideoReader() as reader:
        for source, numbers in islice(numbers_by_source.items(), _SHARDS_OPENED):
            try:
                for sample in read_shard(source, config=config):
                    if sample.number in numbers and sample.media:
                        frame = _first_frame(sample.media, sample.suffix, reader)
                        if frame is not None:
                            frames[source, sample.number] = frame
                    if sample.number >= max(numbers):
                        break
            except (ShardError, StorageError) as error:
                log.warning("no pictures of %s: %s", shown(source), error)
    return frames


def _first_frame(media: bytes, suffix: str, reader: VideoReader) -> Frames | None:
    """The first frame; None if it cannot be decoded, which is why the sample was not kept."""
    try:
        if suffix in IMAGE_SUFFIXES:
            return decode_image(media)[None]
        return reader.read(media, choose=lambda _: [0], deadline_s=10.0).frames
    except MediaError:
        return None
