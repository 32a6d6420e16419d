"""Near-duplicates: a perceptual hash of every clip, and a second, ordered pass that masks all but the first of those alike.

    ROOT/duplicates.parquet    one row per masked record, and the earlier record that it is near to

The hash is 256 signs of random projections of what a clip looks like from afar: its mean frame, 8×8 in brightness and 4×4 in colour
(Charikar, "Similarity estimation techniques from rounding algorithms", 2002): the share of differing bits is the angle between two
such looks over π. The pass compares in key order, whatever order the clips were made in. Knows nothing of Ray, latents or codecs.
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

from data_prep.latents.index import manifests, manifests_digest
from data_prep.storage.folder import Folder

MASK_NAME = "duplicates.parquet"
HASH_BITS = 256
MAX_BITS = 14
"""Up to so many differing bits every pair is found: 16 bands of 16 bits leave two without a difference."""
_BANDS = 16
_NEIGHBOURS = 64
_BRIGHT, _COLOUR = 8, 4

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


def perceptual_hash(frames: npt.NDArray[np.uint8]) -> bytes:
    """32 bytes for uint8 frames [T, H, W, 3]; clips that look alike differ in few of the 256 bits.

    Brightness is taken without its mean, so that how dark a clip is does not make it like all dark clips.

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
        # Four times the pixels each, and colour is what compression changes least.
        parts.append(2 * (np.asarray(part, dtype=np.float64).ravel() - 128))
    return np.packbits(_projections() @ np.concatenate(parts) > 0).tobytes()


def near_earlier(
    hashes: npt.NDArray[np.uint8], owners: npt.NDArray[np.int64], max_bits: int
) -> dict[int, tuple[int, int]]:
    """Row → (the first row before it within `max_bits`, and by how many bits), for rows that have one.

    Compares only rows that agree in two of sixteen bands, found by sorting: n log n, not n². Where more than 64 rows agree in the
    same two bands, a row is held against the 64 before it and the first.

    Args:
        hashes: uint8 [N, 32], in the order that decides who is first.
        owners: [N]; rows of one owner (windows of one clip) are not compared.
        max_bits: at most MAX_BITS.
    """
    assert 0 <= max_bits <= MAX_BITS
    bands = np.ascontiguousarray(hashes).view(np.uint16).reshape(len(hashes), _BANDS)
    found: dict[int, tuple[int, int]] = {}
    for first, second in combinations(range(_BANDS), 2):
        values = np.bitwise_or(
            bands[:, first].astype(np.uint32) << np.uint32(16), bands[:, second], dtype=np.uint32
        )
        for earlier, later in _candidates(values):
            keep = owners[earlier] != owners[later]
            earlier, later = earlier[keep], later[keep]
            differing = np.bitwise_count(hashes[earlier] ^ hashes[later]).sum(axis=1)
            for i in np.flatnonzero(differing <= max_bits):
                row, other = int(later[i]), int(earlier[i])
                if row not in found or other < found[row][0]:
                    found[row] = other, int(differing[i])
    return found


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
    """Mask every record that has an earlier one (by key, window, shard) within `max_bits`; returns how many.

    A function of the manifests and `max_bits` alone; does nothing where the mask that stands was made from the same. Images are
    compared with images, clips with clips.
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
    for manifest in manifests(folder):
        for entry in manifest["files"]:
            if entry["kind"] != "latents":
                continue
            is_image = entry["bucket"].startswith("1x")
            with folder.open(entry["path"]) as source:
                table = pq.read_table(source, columns=["key", "window", "look"])
            for row in table.to_pylist():
                if row["look"]:
                    yield Hashed(
                        row["key"], row["window"], manifest["shard"], is_image, row["look"]
                    )


def masked_ids(folder: Folder) -> frozenset[str]:
    """Ids (`SHARD/KEY/WINDOW`) that the mask names; none where there is no mask."""
    if not folder.exists(MASK_NAME):
        return frozenset()
    with folder.open(MASK_NAME) as source:
        rows = pq.read_table(source, columns=["shard", "key", "window"]).to_pylist()
    return frozenset(f"{row['shard']}/{row['key']}/{row['window']}" for row in rows)
