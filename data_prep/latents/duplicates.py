"""Near-duplicates: a perceptual hash of every clip, and a mask of all but the first of those alike.

    ROOT/duplicates.parquet    one row per masked record, and the earlier record that it is near to

The hash is 256 signs of random projections of what a clip looks like from afar: its mean frame, 8×8
in brightness and 4×4 in colour. The share of differing bits is the angle between two such looks
over π (Charikar, "Similarity estimation techniques from rounding algorithms", 2002). The mask is
made in a second pass, in the order of keys, whatever order the clips were made in. Knows nothing of
Ray, moments or codecs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.latents.ids import Rows
from data_prep.latents.index import LatentIndex, Named, current_manifests, manifests_digest
from data_prep.latents.records import Bucket, stored_rows
from data_prep.storage.folder import Folder
from media.frames import Frames

MASK_NAME = "duplicates.parquet"
HASH_BITS = 256
MAX_BITS = 14
"""Up to so many differing bits every pair is found: they leave two of 16 bands alike."""
_BANDS = 16
_NEIGHBOURS = 64
"""With so many earlier rows of the same bands a row is compared."""
_BRIGHT, _COLOUR = 8, 4
"""Pixels of a side of the small pictures of brightness and of each colour."""

_MASK_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("key", pa.string()),
        pa.field("window", pa.int32()),
        pa.field("of_shard", pa.string()),
        pa.field("of_key", pa.string()),
        pa.field("of_window", pa.int32()),
        pa.field("bits", pa.int32()),  # by which the two hashes differ
    ]
)


class Hashed(NamedTuple):
    """A record and its hash."""

    key: str
    window: int
    shard: str
    is_image: bool
    bits: bytes

    @property
    def id(self) -> str:
        return f"{self.shard}/{self.key}/{self.window}"


@functools.cache
def _projections() -> npt.NDArray[np.float64]:
    size = _BRIGHT**2 + 2 * _COLOUR**2
    return np.random.default_rng(2002).standard_normal((HASH_BITS, size))


def perceptual_hash(frames: Frames) -> bytes:
    """32 bytes for uint8 frames [T, H, W, 3]; clips that look alike differ in few of the 256 bits.

    Brightness is taken without its mean, or else every dark clip would look like every other.

    >>> len(perceptual_hash(np.zeros((5, 32, 32, 3), dtype=np.uint8)))
    32
    """
    mean_HW3 = frames.mean(axis=0, dtype=np.float32).round().astype(np.uint8)
    picture = Image.fromarray(mean_HW3).convert("YCbCr")
    bright, *colours = picture.split()
    small = np.asarray(bright.resize((_BRIGHT, _BRIGHT), Image.Resampling.BOX), dtype=np.float64)
    parts = [(small - small.mean()).ravel()]
    for colour in colours:
        part = colour.resize((_COLOUR, _COLOUR), Image.Resampling.BOX)
        # Each pixel covers four times the area, and compression changes colour least.
        parts.append(2 * (np.asarray(part, dtype=np.float64).ravel() - 128))
    return np.packbits(_projections() @ np.concatenate(parts) > 0).tobytes()


def near_earlier(
    hashes: npt.NDArray[np.uint8], owners: npt.NDArray[np.int64], max_bits: int
) -> dict[int, tuple[int, int]]:
    """For every row near to an earlier one: the first such row, and the bits that differ.

    Only rows that agree in two of sixteen bands are compared. Sorting finds them: n log n, not n².
    If more than 64 rows agree in the same two bands, a row is compared with the first of them and
    the 64 before it.

    >>> hashes = np.zeros((3, 32), dtype=np.uint8)
    >>> hashes[1] = 255
    >>> hashes[2, 0] = 1
    >>> near_earlier(hashes, np.arange(3), max_bits=10)
    {2: (0, 1)}

    Args:
        hashes: uint8 [N, 32], in the order that decides who is first.
        owners: [N]; rows of one owner (windows of one clip) are not compared.
        max_bits: at most MAX_BITS.
    """
    assert 0 <= max_bits <= MAX_BITS
    bands = np.ascontiguousarray(hashes).view(np.uint16).reshape(len(hashes), _BANDS)
    nearest: dict[int, tuple[int, int]] = {}
    for first, second in combinations(range(_BANDS), 2):
        values = np.bitwise_or(
            bands[:, first].astype(np.uint32) << np.uint32(16), bands[:, second], dtype=np.uint32
        )
        for earlier, later in _candidates(values):
            of_two_clips = owners[earlier] != owners[later]
            earlier, later = earlier[of_two_clips], later[of_two_clips]
            differing = np.bitwise_count(hashes[earlier] ^ hashes[later]).sum(axis=1)
            for i in np.flatnonzero(differing <= max_bits):
                row, other = int(later[i]), int(earlier[i])
                if row not in nearest or other < nearest[row][0]:
                    nearest[row] = other, int(differing[i])
    return nearest


def _candidates(
    values: npt.NDArray[np.uint32],
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs of rows of equal value, the earlier ones and the later ones."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    new = np.r_[True, ranked[1:] != ranked[:-1]]
    head = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    behind = np.arange(len(order)) - head
    far = np.flatnonzero(behind > _NEIGHBOURS)
    if len(far):
        yield order[head[far]], order[far]
    for lag in range(1, _NEIGHBOURS + 1):
        rows = np.flatnonzero(behind >= lag)
        if not len(rows):
            return
        yield order[rows - lag], order[rows]


def write_mask(folder: Folder, max_bits: int) -> int:
    """Mask every record that is within `max_bits` of an earlier one; returns how many.

    Earlier is by key, window and shard. Images are compared with images and clips with clips. The
    mask is a function of the manifests and `max_bits` alone: nothing is done if the one that stands
    was made from the same.
    """
    made_from = hashlib.sha256(f"{manifests_digest(folder)} {max_bits}".encode()).hexdigest()
    if folder.exists(MASK_NAME):
        with folder.open(MASK_NAME) as source, pq.ParquetFile(source) as file:
            if (file.schema_arrow.metadata or {}).get(b"made_from") == made_from.encode():
                return int(file.metadata.num_rows)
    records = sorted(_hashed(folder))
    rows = []
    for images in (False, True):
        kind = [record for record in records if record.is_image == images]
        rows += [(kind[row], kind[other], bits) for row, (other, bits) in _near(kind, max_bits)]
    rows.sort()
    values = [(a.shard, a.key, a.window, b.shard, b.key, b.window, bits) for a, b, bits in rows]
    names = _MASK_SCHEMA.names
    table = pa.Table.from_pylist(
        [dict(zip(names, row, strict=True)) for row in values], schema=_MASK_SCHEMA
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"made_from": made_from}), sink)
    folder.write(MASK_NAME, sink.getvalue())
    return len(table)


def _near(records: list[Hashed], max_bits: int) -> list[tuple[int, tuple[int, int]]]:
    if not records:
        return []
    hashes = np.frombuffer(b"".join(r.bits for r in records), dtype=np.uint8).reshape(-1, 32)
    numbers: dict[tuple[str, str], int] = {}
    owners = [numbers.setdefault((r.shard, r.key), len(numbers)) for r in records]
    return sorted(near_earlier(hashes, np.asarray(owners), max_bits).items())


def _hashed(folder: Folder) -> Iterator[Hashed]:
    """Every record that has a hash."""
    for manifest in current_manifests(folder):
        for entry in manifest.latents:
            is_image = Bucket.parse(entry.bucket).is_image
            for row in stored_rows(folder, entry.path, ["key", "window", "look"]):
                if row["look"]:
                    yield Hashed(row["key"], row["window"], manifest.shard, is_image, row["look"])


def masked_rows(folder: Folder, index: LatentIndex) -> Rows:
    """Numbers of the records that the mask names, sorted; none if there is no mask."""
    if not folder.exists(MASK_NAME):
        return np.array([], dtype=np.int64)
    with folder.failing("read", MASK_NAME), folder.open(MASK_NAME) as file:
        table = pq.read_table(file, columns=["shard", "key", "window"])
    shards, keys, windows = (table[name].to_pylist() for name in ("shard", "key", "window"))
    return index.rows_of(Named(shards, keys, windows))


def masked_count(folder: Folder) -> int:
    """How many records the mask names; 0 if there is no mask."""
    if not folder.exists(MASK_NAME):
        return 0
    with folder.failing("read", MASK_NAME), folder.open(MASK_NAME) as file:
        return int(pq.read_metadata(file).num_rows)
