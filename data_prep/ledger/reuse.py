"""What an output already holds of a shard that is made anew, so that only what a change affects is made again.

A change of filters, codec, captioner or of the shard itself (a clip replaced, a json corrected) makes the shard a job again.
Two equalities then spare work, both of content, so that what is taken over is what would have been made:

    the same sample and settings (all but the metadata filters)     its whole outcome: nothing is decoded
    the same frames, and codec and precision, or captioner          its latents, its captions: not made twice

Old files are read until the shard's new ones replace them. Knows ledgers and rows; nothing of Ray.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.clips.filters import METADATA_REASONS
from data_prep.latents.records import Bucket
from data_prep.ledger.job import ShardJob
from data_prep.ledger.ledger import Ledger
from data_prep.row import (
    Row,
    decided,
    join_windows,
)
from data_prep.storage.location import Location

log = logging.getLogger("flowreel.prepare")

_SHARDS_HELD = 4
_LIGHT = ("key", "window", "frames_digest")


class Reuse:
    """Finds what stands of the samples of these jobs. Only jobs whose shard has a manifest cost anything."""

    def __init__(self, out: Location = "", jobs: Iterable[ShardJob] = ()) -> None:
        self.out = out
        self.jobs = {job.name: job for job in jobs if job.encode and job.standing}
        self._shards: OrderedDict[str, _Shard | None] = OrderedDict()

    def outcome(self, row: Row) -> Row | None:
        """The sample's row at its end where it stands for the same input and settings; None where it has to be made.

        A failed sample is always tried again, and one whose caption is missing or another captioner's is not at its end.
        """
        shard = self._shard(row["shard"])
        return shard.outcome(row) if shard is not None else None

    def fill(self, row: Row) -> Row:
        """A window that passed the filters, with the latents and the caption that stand for the same frames."""
        shard = self._shard(row["shard"])
        return shard.fill(row) if shard is not None else row

    def _shard(self, name: str) -> _Shard | None:
        if name not in self.jobs:
            return None
        if name not in self._shards:
            self._shards[name] = _open_shard(self.out, self.jobs[name])
            while len(self._shards) > _SHARDS_HELD:
                self._shards.popitem(last=False)
        self._shards.move_to_end(name)
        return self._shards[name]


class _Place(NamedTuple):
    """Where the latents of a window stand."""

    path: str
    row: int
    key: str
    window: int


def _open_shard(out: Location, job: ShardJob) -> _Shard | None:
    """What stands of a shard; None where nothing of it can be of use."""
    ledger = Ledger(out)
    try:
        done = ledger.manifest(job.name)
        return _Shard(ledger, job, done) if done is not None else None
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, IndexError) as error:
        # What is lost or of an older form is made again.
        log.warning("nothing of shard %s is taken over: %s", job.name, error)
        return None


class _Shard:
    """The standing files of one shard: tables of what there is; moments are read as they are asked for."""

    def __init__(self, ledger: Ledger, job: ShardJob, done: dict[str, Any]) -> None:
        self.ledger = ledger
        self.same_outcome = done.get("outcome_digest") == job.outcome_digest
        self.same_encoding = done.get("encode_digest") == job.encode_digest
        same_captioner = done["caption_digest"] == job.caption_digest
        paths: dict[str, list[str]] = {"status": [], "latents": [], "captions": []}
        for entry in done["files"]:
            paths[entry["kind"]].append(entry["path"])
        self.status: dict[str, Row] = {}
        self.captions: dict[tuple[str, int], Row] = {}
        if self.same_outcome:
            rows = ledger.read_rows(paths["status"][0])
            self.status = {row["source_digest"]: row for row in rows if row["source_digest"]}
        if same_captioner:
            written = ledger.read_rows(paths["captions"][0])
            self.captions = {
                (row["key"], row["window"]): row for row in written if not row["caption_error"]
            }
        self.places: dict[str, _Place] = {}
        self.windows: dict[str, list[_Place]] = {}
        for path in paths["latents"]:
            for number, row in enumerate(ledger.read_rows(path, _LIGHT)):
                place = _Place(path, number, row["key"], row["window"])
                self.windows.setdefault(row["key"], []).append(place)
                if row["frames_digest"]:
                    self.places[row["frames_digest"]] = place
        self._group: tuple[str, int, list[Row]] = ("", -1, [])
        self._files: dict[str, pq.ParquetFile] = {}

    def outcome(self, row: Row) -> Row | None:
        """See `Reuse.outcome`."""
        old = self.status.get(row["source_digest"])
        # What the metadata filters said is always judged anew.
        if old is None or old["status"] == "failed" or old["reason"] in METADATA_REASONS:
            return None
        if old["status"] == "dropped":
            return decided({**row, "reused": True}, "dropped", old["reason"], old["detail"])
        places = sorted(self.windows[old["key"]], key=lambda place: place.window)
        if any((place.key, place.window) not in self.captions for place in places):
            return None
        parts = [self._window(row, place) for place in places]
        # One window may be left of several: the detail says what became of the others.
        return {**join_windows(parts), "status": "kept", "reason": "", "detail": old["detail"]}

    def _window(self, row: Row, place: _Place) -> Row:
        old = self._latents(place)
        row = {
            **self._with_caption(self._with_moments(row, place), place),
            "media": None,
            "window": place.window,
            "frames_shape": [*Bucket.parse(old["bucket"]), 3],
            "pts_s": old["pts_s"],
            "bars": old["bars"],
            "frames_digest": old["frames_digest"],
        }
        return decided(row, "kept", "", "")

    def fill(self, row: Row) -> Row:
        """See `Reuse.fill`."""
        place = self.places.get(row["frames_digest"])
        if place is None:
            return row
        captioned = (place.key, place.window) in self.captions
        if captioned:
            row = self._with_caption(row, place)
        if self.same_encoding:
            row = self._with_moments(row, place)
        if captioned and self.same_encoding:
            return decided({**row, "frames": None}, "kept", "", "")
        return row

    def _with_caption(self, row: Row, place: _Place) -> Row:
        old = self.captions[place.key, place.window]
        return {**row, **{name: old[name] for name in ("synthetic", "captioner", "caption_error")}}

    def _with_moments(self, row: Row, place: _Place) -> Row:
        old = self._latents(place)
        same = {name: old[name] for name in ("mean", "logvar", "codec", "look")}
        return {**row, **same, "latent_shape": old["shape"], "reused": True}

    def _latents(self, place: _Place) -> Row:
        """The row of LATENT_SCHEMA at a place; one row group is held."""
        if place.path not in self._files:
            with self.ledger.folder.failing("read", place.path):
                file = self.ledger.folder.open(place.path)
                self._files[place.path] = pq.ParquetFile(file)
        parquet = self._files[place.path]
        group, first = next((g, at) for g, at, n in _groups(parquet) if place.row < at + n)
        if self._group[:2] != (place.path, group):
            with self.ledger.folder.failing("read", place.path):
                rows = parquet.read_row_group(group).to_pylist()
            self._group = (place.path, group, rows)
        return self._group[2][place.row - first]


def _groups(parquet: pq.ParquetFile) -> Iterator[tuple[int, int, int]]:
    """(number, first row, rows) of every row group."""
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        yield group, first, count
        first += count
