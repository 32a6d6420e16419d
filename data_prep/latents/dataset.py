"""Random access to the records of a prepared dataset: what training reads.

Knows nothing of Ray, decoding or the flow. Torch is imported only when tensors are asked for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.latents.duplicates import masked_rows
from data_prep.latents.ids import Ids, Rows
from data_prep.latents.index import LatentIndex, Place, Split
from data_prep.latents.records import (
    Bucket,
    DatasetInfo,
    LatentDatasetError,
    LatentRecord,
    is_held_out,
    read_record,
)
from data_prep.storage.location import Location
from data_prep.storage.store import StoreFolder, open_folder

if TYPE_CHECKING:
    from torch import Tensor

_OPEN_FILES = 16
_REQUESTS = 16
"""Files that are read at once from a store."""
_MOMENT_COLUMNS = ("shape", "mean", "logvar")
_TEXT_COLUMNS = ("caption", "synthetic")
_NO_NOISE_LOGVAR = -30.0


@dataclass(frozen=True)
class LatentBatch:
    """Records stacked: tensors fp32 [B, T, C, h, w] in codec units, captions in the same order."""

    mean_BTCHW: Tensor
    logvar_BTCHW: Tensor
    captions: list[str]
    """The captions that came with the clips."""
    synthetic: list[str]
    """The captions that the captioner wrote."""
    ids: list[str]


@dataclass
class LatentDataset:
    """Random access to the records of a prepared dataset.

    Ids (`SHARD/KEY/WINDOW`) are made when they are asked for, and where a record lies is looked up,
    both in the mapped index (`data_prep.latents.index`). Moments and captions are read by row
    group, and the last few groups are kept. A shard without a manifest is not there.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from data_prep.latents.records import CAPTION_SCHEMA, LATENT_SCHEMA, write_rows
    >>> from data_prep.ledger.manifest import FileEntry, Manifest, write_manifest
    >>> from flow.latent_convention import LatentConvention
    >>> root = Path(tempfile.mkdtemp())
    >>> for kind in ("latents", "captions"):
    ...     (root / kind).mkdir()
    >>> bucket = Bucket(5, 32, 32)
    >>> info = DatasetInfo("3f0c", LatentConvention((0.0,), (1.0,)), 8.0, (bucket,), 1, "aa")
    >>> _ = (root / "dataset.json").write_text(json.dumps(info.to_dict()))
    >>> mean = np.ones((2, 1, 2, 2), dtype=np.float16)
    >>> record = LatentRecord("a", 0, 0, bucket, 8.0, [0.0] * 5, mean, None, codec="3f0c")
    >>> _ = write_rows(root / "latents/0.5x32x32.parquet", [record.row()], LATENT_SCHEMA)
    >>> caption = {"key": "a", "window": 0, "caption": "A car.", "synthetic": "", "captioner": "m"}
    >>> _ = write_rows(root / "captions/0.parquet", [caption], CAPTION_SCHEMA)
    >>> files = (
    ...     FileEntry("status", "status/0.parquet", 1, ""),
    ...     FileEntry("latents", "latents/0.5x32x32.parquet", 1, "", bucket="5x32x32"),
    ...     FileEntry("captions", "captions/0.parquet", 1, ""),
    ... )
    >>> manifest = Manifest("0", "0.tar", "", "", "aa", "", 1, False, 0, "", "", {}, {}, files)
    >>> write_manifest(open_folder(root), manifest)
    >>> dataset = LatentDataset(root, split="all")
    >>> dataset.buckets
    {Bucket(frames=5, height=32, width=32): ['0/a/0']}
    >>> batch = dataset.load(["0/a/0"])
    >>> tuple(batch.mean_BTCHW.shape), batch.captions
    ((1, 2, 1, 2, 2), ['A car.'])
    >>> dataset.index.find("a").path
    'latents/0.5x32x32.parquet'

    Args:
        root: the folder that `prepare` wrote, a path or a URI such as s3://bucket/latents.
        split: "train", "held_out" (one key in sixteen, by its hash) or "all".
        cached_groups: how many row groups are kept.
        duplicates: "skip" leaves out what `duplicates.parquet` masks, "keep" does not.

    Raises:
        LatentDatasetError: no dataset there, or of another version.
        StorageError: the disk or store fails.
    """

    root: Location
    split: Split = "train"
    cached_groups: int = 256
    duplicates: Literal["skip", "keep"] = "skip"
    info: DatasetInfo = field(init=False)
    buckets: dict[Bucket, Ids] = field(init=False)

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise LatentDatasetError(f"split is {self.split!r}; use train, held_out or all")
        self.folder = open_folder(self.root)
        self.info = DatasetInfo.read(self.root)
        self.index = LatentIndex.open(self.root)
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._files: dict[str, pq.ParquetFile] = {}
        self._masked: Rows = np.array([], dtype=np.int64)
        if self.duplicates == "skip":
            self._masked = masked_rows(self.folder, self.index)
        self.buckets = {}
        for name, ids in self.index.ids(self.split).items():
            if len(self._masked):
                ids = Ids(self.index, ids.rows[~np.isin(ids.rows, self._masked)])
            if len(ids):
                self.buckets[Bucket.parse(name)] = ids
        self.buckets = dict(sorted(self.buckets.items()))

    def __len__(self) -> int:
        return sum(len(ids) for ids in self.buckets.values())

    def ids_digest(self) -> str:
        """Digest of which records the split has, in which buckets: batches are drawn from these."""
        digest = hashlib.sha256()
        for bucket, ids in self.buckets.items():
            digest.update(f"{tuple(bucket)}\n".encode())
            separator = ""
            for part in ids.parts():
                digest.update((separator + "\n".join(part)).encode())
                separator = "\n"
        return digest.hexdigest()[:16]

    def captions(self, name: str) -> tuple[str, str]:
        """Original and synthetic caption of an id."""
        return self._texts(self._place(name))

    def get(self, name: str) -> LatentRecord:
        """The whole record of an id, as it is stored."""
        place = self._place(name)
        with self.folder.open(place.path) as source, pq.ParquetFile(source) as file:
            return read_record(file.read_row_group(place.group), place.row)

    def load(self, ids: Sequence[str]) -> LatentBatch:
        """The records of `ids`, all of one bucket, in the order given.

        Where only means are stored, log-variances come back as −30 (no posterior noise).

        Raises:
            LatentDatasetError: no ids, an unknown id, or ids of different latent shapes.
        """
        import torch

        if not ids:
            raise LatentDatasetError("no ids to load; give at least one")
        places = [self._place(name) for name in ids]
        self._bring(places)
        rows = [self._row(place) for place in places]
        shapes = {tuple(row["shape"]) for row in rows}
        if len(shapes) > 1:
            raise LatentDatasetError(
                f"ids of latent shapes {sorted(shapes)} in one batch; take them from one bucket"
            )
        means = np.stack([_moments(row, "mean") for row in rows])
        logvars = np.stack([_moments(row, "logvar") for row in rows])
        texts = [self._texts(place) for place in places]
        return LatentBatch(
            mean_BTCHW=torch.from_numpy(means),
            logvar_BTCHW=torch.from_numpy(logvars),
            captions=[original for original, _ in texts],
            synthetic=[synthetic for _, synthetic in texts],
            ids=list(ids),
        )

    def _place(self, name: str) -> Place:
        shard, _, rest = name.partition("/")
        key, _, window = rest.rpartition("/")
        row = None
        if window.isdigit() and self._is_ours(key):
            row = self.index.row(key, int(window), shard)
        if row is None or self._is_masked(row):
            raise LatentDatasetError(
                f"no record {name!r} in the {self.split} split of {self.folder.where()}; "
                "ids are in .buckets"
            )
        return self.index.place(row)

    def _is_masked(self, row: int) -> bool:
        at = int(np.searchsorted(self._masked, row))
        return at < len(self._masked) and int(self._masked[at]) == row

    def _is_ours(self, key: str) -> bool:
        return self.split == "all" or is_held_out(key) == (self.split == "held_out")

    def _texts(self, place: Place) -> tuple[str, str]:
        group = self._group(place.caption_path, place.caption_group, _TEXT_COLUMNS)
        original, synthetic = (
            group[name][place.caption_row].as_py() for name in group.schema.names
        )
        return original, synthetic

    def _row(self, place: Place) -> dict[str, Any]:
        group = self._group(place.path, place.group, _MOMENT_COLUMNS)
        return dict(group.slice(place.row, 1).to_pylist()[0])

    def _bring(self, places: Sequence[Place]) -> None:
        """Ask a store for all row groups that a batch needs at once, and not one after another.

        A file is read by one thread; what a disk holds is not worth threads.
        """
        wanted: dict[str, dict[int, Sequence[str]]] = defaultdict(dict)
        if isinstance(self.folder, StoreFolder):
            for place in places:
                for path, group, columns in (
                    (place.path, place.group, _MOMENT_COLUMNS),
                    (place.caption_path, place.caption_group, _TEXT_COLUMNS),
                ):
                    if (path, group) in self._groups:
                        self._groups.move_to_end((path, group))
                    else:
                        wanted[path][group] = columns
        if len(wanted) < 2:
            return

        def read(path: str) -> tuple[str, pq.ParquetFile, dict[int, pa.Table]]:
            with self.folder.failing("read", path):
                file = self._files.get(path) or pq.ParquetFile(self.folder.open(path))
                groups = wanted[path].items()
                return path, file, {g: file.read_row_group(g, columns=list(c)) for g, c in groups}

        with ThreadPoolExecutor(min(_REQUESTS, len(wanted)), "latents") as pool:
            found = [*pool.map(read, wanted)]
        for path, file, tables in found:
            self._files[path] = file
            self._groups |= {(path, group): table for group, table in tables.items()}
        # A batch stays whole, however little is kept.
        while len(self._groups) > max(self.cached_groups, 2 * len(places)):
            self._groups.popitem(last=False)
        while len(self._files) > max(_OPEN_FILES, len(wanted)):
            self._files.pop(next(iter(self._files))).close(force=True)

    def _group(self, path: str, group: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a row group, from the cache if they are there."""
        key = (path, group)
        if key not in self._groups:
            if path not in self._files:
                while len(self._files) >= _OPEN_FILES:
                    self._files.pop(next(iter(self._files))).close(force=True)
                # Of a store's file only the footer comes now; a row group comes when it is wanted.
                self._files[path] = pq.ParquetFile(self.folder.open(path))
            with self.folder.failing("read", path):
                table = self._files[path].read_row_group(group, columns=list(columns))
            self._groups[key] = table
            while len(self._groups) > self.cached_groups:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def __reduce__(self) -> tuple[Any, ...]:
        # It is opened again where it arrives: record numbers mean something beside one index only.
        return LatentDataset, (self.root, self.split, self.cached_groups, self.duplicates)


def _moments(row: dict[str, Any], name: str) -> npt.NDArray[np.float32]:
    if row[name] is None:
        return np.full(row["shape"], _NO_NOISE_LOGVAR, dtype=np.float32)
    return np.frombuffer(row[name], dtype="<f2").reshape(row["shape"]).astype(np.float32)
