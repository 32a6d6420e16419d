"""A shard's captions become its file of encoded prompts; which shards are left.

Every distinct prompt of a shard is encoded once, in the order of its id, and vectors that the same
encoder has made before are taken over. The file is written first and the manifest last, so that a
kill leaves the old texts or the new ones. Knows nothing of Ray, or of who trains on what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.latents.index import current_manifests
from data_prep.latents.records import GROUP_BYTES, stored_rows, write_groups
from data_prep.ledger.errors import LedgerError
from data_prep.ledger.manifest import FileEntry, Manifest, read_manifest, write_manifest
from data_prep.storage.folder import Folder
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder
from data_prep.texts.records import TEXT_SCHEMA, TEXTS, EncoderIdentity, TextSettings, prompt_id
from flow.text_spec import TextError
from flowreel.values import digest_of

if TYPE_CHECKING:
    from torch import Tensor

    from flow.text import TextEncoder

_AT_ONCE = 64
"""Prompts that go through the encoder together, and most rows of a row group."""
FP16_MAX = 65504.0

Row = dict[str, Any]


def made_by(settings: TextSettings, manifest: Manifest) -> str:
    """Digest of what a shard's file of texts is made with and from."""
    return digest_of([settings.digest, manifest.captions.sha256])


def shards_left(folder: Folder, settings: TextSettings) -> list[str]:
    """Names of finished shards without a file of these settings and of their captions now.

    Raises:
        LatentDatasetError: nothing was prepared there.
        DamagedManifest, StorageError: a manifest cannot be read.
    """
    return [m.shard for m in current_manifests(folder) if not is_made(settings, m)]


def is_made(settings: TextSettings, manifest: Manifest) -> bool:
    """Whether a shard has a file of these settings and of its captions now."""
    entry = manifest.texts
    return entry is not None and entry.made_by == made_by(settings, manifest)


@dataclass(frozen=True)
class ShardTexts:
    """What became of one shard. Small and picklable."""

    shard: str
    encoded: int
    """Prompts that the encoder was asked for."""
    taken_over: int
    """Prompts whose vectors stood."""


class TextWriter:
    """Writes the files of shards, with an encoder of its own.

    Args:
        out: the dataset, a path or URI.
        settings: encoder and forms.
        device: where the encoder computes.
        still_ours: raises if the right to write was lost (`data_prep.ledger.locks.lock_writing`).

    Raises:
        TextError: the encoder cannot be had here, or its weights are not those of the settings.
    """

    def __init__(
        self,
        out: Location,
        settings: TextSettings,
        device: str = "cpu",
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        from flow.text import build_text_encoder

        self.folder = open_folder(out)
        self.settings = settings
        self.encoder = build_text_encoder(settings.encoder.spec, device)
        self._still_ours = still_ours
        difference = settings.encoder.difference(EncoderIdentity.of(settings.encoder.spec))
        if difference:
            raise TextError(
                f"the text encoder on this machine is another than where the run was started "
                f"({difference}); put the same files at text.path on every machine"
            )

    def write(self, shard: str) -> ShardTexts:
        """Write a shard's file and its manifest.

        Raises:
            LedgerError: the shard is not finished any more.
            TextError: a vector that fp16 does not hold.
            OutputBusy: the right to write was lost.
            StorageError: the disk or store failed.
        """
        manifest = read_manifest(self.folder, shard)
        if manifest is None:
            raise LedgerError(
                f"the manifest of shard {shard} went away while its prompts were encoded; run again"
            )
        wanted = shard_prompts(self.folder, manifest, self.settings)
        standing = _Standing(self.folder, manifest, self.settings.encoder.digest)
        encoded = [prompt for prompt in wanted if prompt not in standing]
        self._still_ours()
        path = f"{TEXTS}/{shard}.parquet"
        with self.folder.replacing(path) as partial:
            groups = _groups(self._rows(wanted, standing))
            count, sha256 = write_groups(partial, groups, TEXT_SCHEMA)
        entry = FileEntry("texts", path, count, sha256, made_by=made_by(self.settings, manifest))
        others = [other for other in manifest.files if other.kind != "texts"]
        self._still_ours()
        write_manifest(self.folder, replace(manifest, files=(*others, entry)))
        return ShardTexts(shard, len(encoded), len(wanted) - len(encoded))

    def _rows(self, prompts: Sequence[str], standing: _Standing) -> Iterator[Row]:
        """A row of each prompt, in this order; so many as go through the encoder are held."""
        for start in range(0, len(prompts), _AT_ONCE):
            part = prompts[start : start + _AT_ONCE]
            new = [prompt for prompt in part if prompt not in standing]
            rows = dict(zip(new, encoded_rows(new, self.encoder, self.settings), strict=True))
            for prompt in part:
                yield rows[prompt] if prompt in rows else standing.row(prompt)


def shard_prompts(folder: Folder, manifest: Manifest, settings: TextSettings) -> list[str]:
    """Every distinct prompt of a shard, in the order of ids.

    Captions are the original, the synthetic and the empty one.
    """
    captions = {
        (row["key"], row["window"]): ["", row["caption"], row["synthetic"]]
        for row in stored_rows(
            folder, manifest.captions.path, ["key", "window", "caption", "synthetic"]
        )
    }
    prompts: set[str] = set()
    for entry in manifest.latents:
        for row in stored_rows(folder, entry.path, ["key", "window"]):
            of_clip = captions[row["key"], row["window"]]
            prompts.update(settings.prompts(entry.bucket, of_clip))
    return sorted(prompts, key=prompt_id)


def encoded_rows(
    prompts: Sequence[str], encoder: TextEncoder, settings: TextSettings
) -> Iterator[Row]:
    """A row of each prompt. Raises TextError where fp16 does not hold a vector."""
    from flow.text import without_padding

    if not prompts:
        return
    for prompt, text_JE in zip(prompts, encoder.encode(list(prompts)), strict=True):
        vectors_NE = without_padding(text_JE)
        yield {
            "id": prompt_id(prompt),
            "prompt": prompt,
            "encoder": settings.encoder.digest,
            "tokens": len(vectors_NE),
            "vectors": _as_fp16(prompt, vectors_NE),
        }


def _as_fp16(prompt: str, vectors_NE: Tensor) -> bytes:
    import torch

    # A T5 ends in a normalization, so that its vectors are small; these would be a broken one's.
    if not bool(torch.isfinite(vectors_NE).all()) or (vectors_NE.abs() > FP16_MAX).any():
        raise TextError(
            f"the encoder gives {float(vectors_NE.abs().max()):g} for the prompt {prompt[:60]!r}; "
            f"prompts are stored as fp16, which ends at {FP16_MAX:g}. Look at the encoder's "
            "weights; or train without encoded prompts: the encoder then runs in training"
        )
    return vectors_NE.half().numpy().astype("<f2").tobytes()


def _groups(rows: Iterator[Row]) -> Iterator[pa.Table]:
    """Rows as tables, each for a row group of about a megabyte."""
    group: list[Row] = []
    held_bytes = 0
    for row in rows:
        group.append(row)
        held_bytes += len(row["vectors"])
        if held_bytes >= GROUP_BYTES or len(group) == _AT_ONCE:
            yield pa.Table.from_pylist(group, schema=TEXT_SCHEMA)
            group, held_bytes = [], 0
    if group:
        yield pa.Table.from_pylist(group, schema=TEXT_SCHEMA)


class _Standing:
    """What the shard's file that stands holds of an encoder; rows are read when asked for."""

    def __init__(self, folder: Folder, manifest: Manifest, encoder: str) -> None:
        self.folder = folder
        self._path = manifest.texts.path if manifest.texts is not None else ""
        self._places: dict[str, tuple[int, int]] = {}
        self._group: tuple[int, list[Row]] = (-1, [])
        if not (self._path and folder.exists(self._path)):
            return
        with folder.failing("read", self._path):
            self._file = pq.ParquetFile(folder.open(self._path))
            if not self._file.schema_arrow.equals(TEXT_SCHEMA):
                return
            for group in range(self._file.metadata.num_row_groups):
                rows = self._file.read_row_group(group, columns=["prompt", "encoder"]).to_pylist()
                for at, row in enumerate(rows):
                    if row["encoder"] == encoder:
                        self._places[row["prompt"]] = group, at

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._places

    def row(self, prompt: str) -> Row:
        """The whole row of a prompt that is here; one row group is held."""
        group, at = self._places[prompt]
        if self._group[0] != group:
            with self.folder.failing("read", self._path):
                self._group = group, self._file.read_row_group(group).to_pylist()
        return self._group[1][at]
