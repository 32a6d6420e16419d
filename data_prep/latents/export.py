"""A latent dataset as WebDataset tars, for other trainers.

    OUT/export.json                 what was exported; another dataset is refused there
    OUT/17x64x64-00000.tar          clips of one bucket, in the order of their ids

    ID.mean.npy, ID.logvar.npy      fp16 [t, C, h, w], codec units
    ID.txt                          the original caption
    ID.json                         id, key, window, shard, synthetic caption, bucket, fps, pts,
                                    codec, latent convention

ID is `SHARD/KEY/WINDOW` with dots and slashes percent-encoded, because WebDataset splits names at
them. The same dataset gives the same bytes. Tars that stand are not written again: a killed export
goes on when it is run again. Knows nothing of Ray or torch.

    ExportError(FlowreelError, ValueError)   the folder holds another export
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from data_prep.latents.dataset import LatentDataset, Split
from data_prep.latents.index import manifests_digest
from data_prep.progress import Progress
from data_prep.sources.samples import write_shard
from data_prep.storage.location import Location, failing
from flowreel.errors import FlowreelError
from flowreel.files import write_whole

_HEADERS_BYTES = 8 * 1024
"""What the members of a record take in a tar beside their moments, about."""


class ExportError(FlowreelError, ValueError):
    """The export cannot be written there."""


def export_webdataset(
    root: Location,
    out: Path,
    *,
    shard_bytes: int = 2**30,
    split: Split = "all",
    progress: Progress | None = None,
) -> list[Path]:
    """Write the tars and return their paths; what `duplicates.parquet` masks is left out.

    Args:
        root: the folder that `prepare` wrote, a path or a URI.
        out: local folder of the tars.
        shard_bytes: bytes of a tar, about; it holds one record at least.
        split: "train", "held_out" or "all".
        progress: called as records are written.

    Raises:
        LatentDatasetError: no dataset there.
        ExportError: `out` holds the tars of another dataset, split or size.
        StorageError: the disk or store fails.
    """
    dataset = LatentDataset(root, split)
    made_from = {
        "manifests": manifests_digest(dataset.folder),
        "ids": dataset.ids_digest(),
        "shard_bytes": shard_bytes,
        "split": split,
    }
    note = out / "export.json"
    if note.is_file() and json.loads(note.read_text()) != made_from:
        raise ExportError(
            f"{out} holds the export of another dataset, split or tar size; "
            "choose another folder or delete it"
        )
    with failing("write", note):
        write_whole(note, json.dumps(made_from, indent=1))
    paths, count = [], 0
    for bucket, names in dataset.buckets.items():
        per_tar = max(1, shard_bytes // _record_bytes(dataset, names[0]))
        for number, first in enumerate(range(0, len(names), per_tar)):
            path, part = out / f"{bucket}-{number:05d}.tar", names[first : first + per_tar]
            if not path.is_file():
                write_shard(path, _samples(dataset, part))
            paths.append(path)
            count += len(part)
            if progress is not None:
                progress(count, len(dataset))
    return paths


def _record_bytes(dataset: LatentDataset, name: str) -> int:
    """Bytes of a record in a tar, headers and padding included, about the same in a bucket."""
    record = dataset.get(name)
    arrays = record.mean.nbytes * (1 if record.logvar is None else 2)
    return arrays + _HEADERS_BYTES


def _samples(dataset: LatentDataset, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    convention = dataset.info.convention.to_dict()
    for name in names:
        record = dataset.get(name)
        original, synthetic = dataset.captions(name)
        sample: dict[str, Any] = {
            "__key__": quote(name, safe="").replace(".", "%2E"),
            "json": {
                "id": name,
                "key": record.key,
                "window": record.window,
                "shard": name.partition("/")[0],
                "synthetic_caption": synthetic,
                "bucket": str(record.bucket),
                "fps": record.fps,
                "pts_s": list(record.pts_s),
                "codec": record.codec,
                "convention": convention,
            },
            "mean.npy": _npy(record.mean),
            "txt": original,
        }
        if record.logvar is not None:
            sample["logvar.npy"] = _npy(record.logvar)
        yield sample


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()
