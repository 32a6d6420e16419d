"""What an output already holds of a shard that is made anew: only what a change affects is remade.

A change of filters, codec, captioner or of the shard itself (a clip replaced, a json corrected)
makes the shard a job again. Two equalities then spare work. Both are of content, so that what is
taken over is what would have been made:

    same sample, same settings but for the metadata filters   its whole outcome: no decoding
    same frames, and same codec and precision, or captioner   its latents, or its captions

Old files are read until the shard's new ones replace them. Knows nothing of Ray.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import METADATA_REASONS
from data_prep.latents.records import Bucket, stored_rows
from data_prep.ledger.errors import DamagedManifest
from data_prep.ledger.job import ShardJob
from data_prep.ledger.manifest import Manifest, read_manifest
from data_prep.row import Row, decided, is_final, join_windows
from data_prep.storage.folder import Folder
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder

log = logging.getLogger("flowreel.prepare")

_SHARDS_HELD = 4
_LIGHT = ("key", "window", "frames_digest")


class Reuse:
    """What stands of the samples of these jobs. Jobs whose shard has no manifest cost nothing.

    >>> Reuse().outcome({"shard": "00000"}) is None
    True
    """

    def __init__(self, out: Location = "", jobs: Iterable[ShardJob] = ()) -> None:
        self.out = out
        self.jobs = {job.name: job for job in jobs if job.encode and job.standing}
        self._shards: OrderedDict[str, _StandingShard | None] = OrderedDict()

    def outcome(self, row: Row) -> Row | None:
        """The sample's row at its end, of the same input and settings; None if it must be made.

        A failed sample is always tried again. One whose caption is missing, or of another
        captioner, is not at its end.
        """
        shard = self._shard(row["shard"])
        return shard.outcome(row) if shard is not None else None

    def fill(self, row: Row) -> Row:
        """A window that passed the filters, with what stands of the same frames."""
        shard = self._shard(row["shard"])
        return shard.fill(row) if shard is not None else row

    def _shard(self, name: str) -> _StandingShard | None:
        if name not in self.jobs:
            return None
        if name not in self._shards:
            self._shards[name] = _open_shard(self.out, self.jobs[name])
            while len(self._shards) > _SHARDS_HELD:
                self._shards.popitem(last=False)
        self._shards.move_to_end(name)
        return self._shards[name]


class _StandingWindow(NamedTuple):
    """Where the latents of a window stand."""

    path: str
    row: int
    """Its row in the file, from 0."""
    key: str
    window: int


def _open_shard(out: Location, job: ShardJob) -> _StandingShard | None:
    """What stands of a shard; None if nothing of it can be of use."""
    folder = open_folder(out)
    try:
        manifest = read_manifest(folder, job.name)
        return _StandingShard(folder, job, manifest) if manifest is not None else None
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, DamagedManifest) as error:
        # What is lost or of an older form is made again.
        log.warning("nothing of shard %s is taken over: %s", job.name, error)
        return None


class _StandingShard:
    """The standing files of one shard: tables of what there is; moments are read when asked for."""

    def __init__(self, folder: Folder, job: ShardJob, manifest: Manifest) -> None:
        self.folder = folder
        self.same_encoding = manifest.encode_digest == job.encode_digest
        self.status: dict[str, Row] = {}
        """Status rows by the digest of the sample they are of."""
        self.captions: dict[tuple[str, int], Row] = {}
        """Caption rows by key and window."""
        if manifest.outcome_digest == job.outcome_digest:
            rows = stored_rows(folder, manifest.status.path)
            self.status = {row["source_digest"]: row for row in rows if row["source_digest"]}
        if manifest.caption_digest == job.caption_digest:
            rows = stored_rows(folder, manifest.captions.path)
            self.captions = {
                (row["key"], row["window"]): row
                for row in rows
                if not row["caption_error"] or is_final(row["caption_error"])
            }
        self.by_frames: dict[str, _StandingWindow] = {}
        self.by_key: dict[str, list[_StandingWindow]] = {}
        for entry in manifest.latents:
            for number, row in enumerate(stored_rows(folder, entry.path, _LIGHT)):
                window = _StandingWindow(entry.path, number, row["key"], row["window"])
                self.by_key.setdefault(row["key"], []).append(window)
                if row["frames_digest"]:
                    self.by_frames[row["frames_digest"]] = window
        self._group: tuple[str, int, list[Row]] = ("", -1, [])
        self._files: dict[str, pq.ParquetFile] = {}

    def outcome(self, row: Row) -> Row | None:
        """See `Reuse.outcome`."""
        old = self.status.get(row["source_digest"])
        # What the metadata filters decide is always judged anew.
        if old is None or old["status"] == "failed" or old["reason"] in METADATA_REASONS:
            return None
        if old["status"] == "dropped":
            return decided({**row, "reused": True}, "dropped", old["reason"], old["detail"])
        windows = sorted(self.by_key[old["key"]], key=lambda window: window.window)
        if any((window.key, window.window) not in self.captions for window in windows):
            return None
        parts = [self._whole_window(row, window) for window in windows]
        # One window may be left of several: the detail says what became of the others.
        return {**join_windows(parts), "status": "kept", "reason": "", "detail": old["detail"]}

    def _whole_window(self, row: Row, window: _StandingWindow) -> Row:
        old = self._latents(window)
        row = {
            **self._with_caption(self._with_moments(row, window), window),
            "media": None,
            "window": window.window,
            "frames_shape": [*Bucket.parse(old["bucket"]), 3],
            "pts_s": old["pts_s"],
            "bars": old["bars"],
            "frames_digest": old["frames_digest"],
        }
        return decided(row, "kept", "", "")

    def fill(self, row: Row) -> Row:
        """See `Reuse.fill`."""
        window = self.by_frames.get(row["frames_digest"])
        if window is None:
            return row
        has_caption = (window.key, window.window) in self.captions
        if has_caption:
            row = self._with_caption(row, window)
        if self.same_encoding:
            row = self._with_moments(row, window)
        if has_caption and self.same_encoding:
            return decided({**row, "frames": None}, "kept", "", "")
        return row

    def _with_caption(self, row: Row, window: _StandingWindow) -> Row:
        old = self.captions[window.key, window.window]
        return {**row, **{name: old[name] for name in ("synthetic", "captioner", "caption_error")}}

    def _with_moments(self, row: Row, window: _StandingWindow) -> Row:
        old = self._latents(window)
        same = {name: old[name] for name in ("mean", "logvar", "codec", "look")}
        return {**row, **same, "latent_shape": old["shape"], "reused": True}

    def _latents(self, window: _StandingWindow) -> Row:
        """The row of LATENT_SCHEMA of a window; one row group is held."""
        path = window.path
        if path not in self._files:
            with self.folder.failing("read", path):
                self._files[path] = pq.ParquetFile(self.folder.open(path))
        parquet = self._files[path]
        group, first = next((g, at) for g, at, n in _groups(parquet) if window.row < at + n)
        if self._group[:2] != (path, group):
            with self.folder.failing("read", path):
                rows = parquet.read_row_group(group).to_pylist()
            self._group = (path, group, rows)
        return self._group[2][window.row - first]


def _groups(parquet: pq.ParquetFile) -> Iterator[tuple[int, int, int]]:
    """Number, first row and count of rows of every row group."""
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        yield group, first, count
        first += count
