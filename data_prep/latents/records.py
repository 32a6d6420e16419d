"""Latent shards on disk: what is stored, and how rows are written and read.

    ROOT/dataset.json                  DatasetInfo: codec digest, latent convention, fps, buckets
    ROOT/manifests/SHARD.json          the files of a finished shard (`data_prep.ledger.manifest`)
    ROOT/manifests.parquet             the manifests of many shards in one file
    ROOT/latents/SHARD.TxHxW.parquet   one row per (key, window): moments of the codec's posterior
    ROOT/captions/SHARD.parquet        one row per (key, window): original and synthetic caption
    ROOT/texts/SHARD.parquet           one row per prompt: its vectors (`data_prep.texts.records`)
    ROOT/status/SHARD.parquet          one row per sample that went in, kept or not

A shard counts only once its manifest stands. Captions and latents are separate files, so that new
captions never need new latents. ROOT is a local folder or one in an object store
(`data_prep.storage.folder`), of which a reader takes the row groups that it needs. Knows nothing of
Ray or of decoding.

    LatentDatasetError(FlowreelError, ValueError)   no dataset here, another version, an unknown id
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.storage.folder import Folder
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder
from flowreel.errors import FlowreelError

if TYPE_CHECKING:
    from flow.latent_convention import LatentConvention

FORMAT_VERSION = 1
INFO_NAME = "dataset.json"
GROUP_BYTES = 1 << 20
"""About how many bytes of moments a row group holds."""
MOMENTS = ("mean", "logvar")
"""The columns that hold megabytes."""
_AS_THEY_ARE = (*MOMENTS, "vectors")
"""The columns of any file that are not compressed; the last is that of encoded prompts."""
HELD_OUT_SHARE = 16
"""One key in so many is held out."""

LATENT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("shape", pa.list_(pa.int32(), 4), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("mean", pa.large_binary(), nullable=False),
        pa.field("logvar", pa.large_binary()),
        pa.field("pts_s", pa.list_(pa.float64()), nullable=False),
        pa.field("fps", pa.float32(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("bars", pa.list_(pa.int32(), 4), nullable=False),
        pa.field("codec", pa.string(), nullable=False),
        pa.field("look", pa.binary()),  # perceptual hash, data_prep.latents.duplicates
        pa.field("frames_digest", pa.string()),  # SHA-256 of what was encoded
    ]
)
CAPTION_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("synthetic", pa.string(), nullable=False),
        pa.field("captioner", pa.string(), nullable=False),
        # `code: detail` where no synthetic caption could be had, else null.
        pa.field("caption_error", pa.string()),
    ]
)
STATUS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("source_digest", pa.string()),  # SHA-256 of the sample as it was read
    ]
)


class LatentDatasetError(FlowreelError, ValueError):
    """A latent dataset that cannot be read, or an id that is not in it."""


class Bucket(NamedTuple):
    """Size of a clip: `frames` (1 for images), and `height` and `width` in pixels.

    >>> str(Bucket(17, 64, 64)), Bucket.parse("17x64x64") == Bucket(17, 64, 64)
    ('17x64x64', True)
    """

    frames: int
    height: int
    width: int

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """The bucket of a text such as 17x64x64. Raises LatentDatasetError on another form."""
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise LatentDatasetError(f"{text!r} is no bucket; write FRAMESxHEIGHTxWIDTH")
        return cls(*(int(part) for part in parts))


def is_held_out(key: str) -> bool:
    """Whether a sample's key belongs to the held-out split: a stable hash, one in HELD_OUT_SHARE.

    >>> sum(is_held_out(f"clip{n}") for n in range(1600))
    101
    """
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class LatentRecord:
    """Moments of one window of one clip, as they are stored.

    >>> mean = np.zeros((2, 24, 2, 2), dtype=np.float16)
    >>> record = LatentRecord(
    ...     key="a", window=0, number=0, bucket=Bucket(5, 32, 32), fps=8.0,
    ...     pts_s=[0.0, 0.125, 0.25, 0.375, 0.5], mean=mean, logvar=None, codec="3f0c",
    ... )
    >>> record.row()["shape"], record.row()["bucket"]
    ([2, 24, 2, 2], '5x32x32')
    """

    key: str
    window: int
    """Number of the window of frames among those cut from the clip."""
    number: int
    """Place of the sample in its input shard."""
    bucket: Bucket
    fps: float
    pts_s: Sequence[float]
    """[frames] time of each frame in the source, in seconds."""
    mean: npt.NDArray[np.float16]
    """[t, C, h, w] posterior mean, codec units."""
    logvar: npt.NDArray[np.float16] | None
    """[t, C, h, w] posterior log-variance, or None where only the mean is kept."""
    codec: str
    """Digest of the codec that made the moments."""
    look: bytes | None = None
    """Perceptual hash of the frames (`data_prep.latents.duplicates`)."""
    bars: tuple[int, ...] = (0, 0, 0, 0)
    """Pixels of black bars cut off the source before the resize: top, bottom, left, right."""
    frames_digest: str | None = None
    """SHA-256 of the frames that were encoded; None in older datasets."""

    def row(self) -> dict[str, Any]:
        """The record as a row of LATENT_SCHEMA."""
        moments = {
            name: None if array is None else np.ascontiguousarray(array, dtype="<f2").tobytes()
            for name, array in (("mean", self.mean), ("logvar", self.logvar))
        }
        return {**self.facts(), **moments}

    def facts(self) -> dict[str, Any]:
        """The record as a row of LATENT_SCHEMA without its moments."""
        return {
            "key": self.key,
            "window": self.window,
            "number": self.number,
            "shape": list(self.mean.shape),
            "dtype": "float16",
            "pts_s": [float(t) for t in self.pts_s],
            "fps": self.fps,
            "bucket": str(self.bucket),
            "bars": list(self.bars),
            "codec": self.codec,
            "look": self.look,
            "frames_digest": self.frames_digest,
        }


def rows_per_group(record_bytes: int) -> int:
    """Rows in a row group: about a megabyte of moments, so that one record is read cheaply."""
    return max(1, min(64, GROUP_BYTES // record_bytes)) if record_bytes else 4096


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Write rows, already in order, as Parquet and return their number; same rows, same bytes.

    Only one row group is held in memory.
    """
    return write_groups(path, row_groups(rows, schema), schema)[0]


def row_groups(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as tables, each for one row group."""
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        moments_bytes = len(row.get("mean") or b"") + len(row.get("logvar") or b"")
        if len(group) >= rows_per_group(moments_bytes):
            yield pa.Table.from_pylist(group, schema=schema)
            group = []
    if group:
        yield pa.Table.from_pylist(group, schema=schema)


def write_groups(path: Path, groups: Iterable[pa.Table], schema: pa.Schema) -> tuple[int, str]:
    """Write tables as Parquet, each as one row group; the rows, and the file's SHA-256.

    The same tables, in the same chunks, give the same bytes. Moments are stored as they are: zstd
    takes as long over them as everything else that a sink does, to save a twelfth of a Gaussian
    mean and a third of a log-variance (`python -m benchmarks.prepare --scale`).
    """
    compression = {_leaf(f): "none" if f.name in _AS_THEY_ARE else "zstd" for f in schema}
    digest, count = _GrowingDigest(), 0
    with pq.ParquetWriter(
        path, schema, compression=compression, use_dictionary=False, write_statistics=False
    ) as writer:
        for group in groups:
            writer.write_table(group)
            count += len(group)
            digest.follow(path)
    digest.follow(path)
    return count, digest.hexdigest()


def _leaf(field: pa.Field) -> str:
    """The name of a column in Parquet."""
    return f"{field.name}.list.element" if pa.types.is_nested(field.type) else str(field.name)


class _GrowingDigest:
    """SHA-256 of a file that only grows, taken while what was written is still in memory."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._done_bytes = 0
        self._buffer = bytearray(1 << 20)

    def follow(self, path: Path) -> None:
        """Take in what was written since the last call."""
        view = memoryview(self._buffer)
        with path.open("rb", buffering=0) as file:
            file.seek(self._done_bytes)
            while size_bytes := file.readinto(view):
                self._digest.update(view[:size_bytes])
                self._done_bytes += size_bytes

    def hexdigest(self) -> str:
        """The digest of what was taken in, as hex digits."""
        return self._digest.hexdigest()


def stored_rows(
    folder: Folder, path: str, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of an output file, or some columns of them. Raises FileNotFoundError, StorageError.

    Args:
        folder: the dataset's folder.
        path: of the file, relative to it, as a manifest names it.
        columns: all of them by default.
    """
    with folder.failing("read", path), folder.open(path) as file:
        names = None if columns is None else list(columns)
        return list(pq.read_table(file, columns=names).to_pylist())


@dataclass(frozen=True)
class DatasetInfo:
    """What is common to all records of a dataset: `dataset.json`."""

    codec_digest: str
    convention: LatentConvention
    fps: float
    """Frame rate of the clips (images have none), frames per second."""
    buckets: tuple[Bucket, ...]
    latent_channels: int
    prepare_digest: str
    """Digest of the settings that decide what a sample becomes."""
    version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `dataset.json`."""
        return {
            "version": self.version,
            "codec_digest": self.codec_digest,
            "convention": self.convention.to_dict(),
            "fps": self.fps,
            "buckets": [str(bucket) for bucket in self.buckets],
            "latent_channels": self.latent_channels,
            "prepare_digest": self.prepare_digest,
        }

    @classmethod
    def read(cls, root: Location) -> DatasetInfo:
        """From `root/dataset.json`. Raises LatentDatasetError where there is none to read."""
        # Imported here, because it brings torch, without which everything else here works.
        from flow.latent_convention import LatentConvention

        values = read_info_values(root)
        return cls(
            codec_digest=values["codec_digest"],
            convention=LatentConvention.from_dict(values["convention"]),
            fps=values["fps"],
            buckets=tuple(Bucket.parse(text) for text in values["buckets"]),
            latent_channels=values["latent_channels"],
            prepare_digest=values["prepare_digest"],
            version=values["version"],
        )


def read_info_values(root: Location) -> dict[str, Any]:
    """`root/dataset.json` as plain values, its version checked; without torch.

    Raises:
        LatentDatasetError: there is none, or it is of another version.
    """
    folder = open_folder(root)
    try:
        values = json.loads(folder.read(INFO_NAME))
    except FileNotFoundError as error:
        raise LatentDatasetError(
            f"no latent dataset in {folder.where()}: {INFO_NAME} is missing; prepare one"
        ) from error
    if values.get("version") != FORMAT_VERSION:
        raise LatentDatasetError(
            f"{folder.where(INFO_NAME)} has format version {values.get('version')!r}; "
            f"this code reads {FORMAT_VERSION}. Prepare the shards again"
        )
    return dict(values)


def read_record(group: pa.Table, row: int) -> LatentRecord:
    """A row of a row group of LATENT_SCHEMA as a record."""
    values = group.slice(row, 1).to_pylist()[0]
    moments = {
        name: np.frombuffer(values[name], dtype="<f2").reshape(values["shape"])
        for name in ("mean", "logvar")
        if values[name] is not None
    }
    return LatentRecord(
        key=values["key"],
        window=values["window"],
        number=values["number"],
        bucket=Bucket.parse(values["bucket"]),
        fps=values["fps"],
        pts_s=values["pts_s"],
        mean=moments["mean"],
        logvar=moments.get("logvar"),
        codec=values["codec"],
        look=values["look"],
        bars=tuple(values["bars"]),
        frames_digest=values.get("frames_digest"),
    )
