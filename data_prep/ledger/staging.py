"""Finished samples of unfinished shards: they survive a kill and are not computed again.

    OUT/staging/SHARD/DIGEST/NUMBERS.arrow   rows of STAGED_SCHEMA, one per window of frames
    OUT/staging/SHARD/DIGEST/end.json        what the reader says at the shard's end

DIGEST is that of the job, so that samples of other settings never mix. NUMBERS are those of the
samples in the file, as ranges (`00000003-00000007_00000009`): a listing says what is finished. A
sample may come more than once; the first one counts. Several threads may call this, each for
another shard, and `write` for the same one. Knows nothing of how a sample is made, or of what
becomes of the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.latents.records import (
    CAPTION_SCHEMA,
    LATENT_SCHEMA,
    MOMENTS,
    STATUS_SCHEMA,
    rows_per_group,
)
from data_prep.ledger.job import ShardJob
from data_prep.row import Row
from data_prep.sources.samples import ShardSummary
from data_prep.storage.folder import Folder, map_at_once

STAGING = "staging"
"""The folder of staged samples, below the output."""

_LATENT_FIELDS = [f for f in LATENT_SCHEMA if f.name not in ("key", "number")]
_CAPTION_FIELDS = [f for f in CAPTION_SCHEMA if f.name not in ("key", "window")]
STAGED_SCHEMA = pa.schema(
    [*STATUS_SCHEMA, *(f.with_nullable(True) for f in (*_LATENT_FIELDS, *_CAPTION_FIELDS))]
)
"""A finished sample: its status and, if it is kept, its latents and captions."""
_LIGHT = [*STATUS_SCHEMA.names, "window", "bucket", *(f.name for f in _CAPTION_FIELDS)]
"""The columns that are held in memory of the staged samples of shards in flight."""
_NAME_CHARS = 180
"""Most characters of NUMBERS; a file system takes 255 for the whole name."""
_NAME = re.compile(r"\d+(-\d+)?(_\d+(-\d+)?)*\.arrow")
_MAPPED_FILES = 64
"""Most staged files of a disk that are mapped at once."""


class Place(NamedTuple):
    """Where a staged row is."""

    base: str
    """Base name of its file; empty where it is only held in memory."""
    row: int


class StagedSample(NamedTuple):
    """A finished sample, without its moments."""

    rows: list[Row]
    """Its rows, one per window, with the light columns only."""
    first: Place
    """Where its first row is; the others follow."""


class Staging:
    """The staged samples of an output.

    >>> import tempfile
    >>> from data_prep.storage.store import open_folder
    >>> staging = Staging(open_folder(tempfile.mkdtemp()))
    >>> job = ShardJob("00000", "/data/00000.tar", "size:9 mtime_ns:1", "aa", "bb")
    >>> row = {"key": "a", "shard": "00000", "number": 3, "status": "failed",
    ...        "reason": "empty_video", "detail": "it has 0 bytes"}
    >>> staging.put(job, pa.Table.from_pylist([row, {**row, "number": 4}], STAGED_SCHEMA))
    >>> staging.numbers(job), staging.shards()
    ({3, 4}, ['00000'])
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._samples: dict[str, dict[int, StagedSample]] = {}
        self._held: dict[str, pa.Table] = {}
        self._summaries: dict[str, ShardSummary | None] = {}
        self._begun: dict[str, set[str]] = {}

    def shards(self) -> list[str]:
        """Names of the shards of which something is staged."""
        return self.folder.folders(STAGING)

    def numbers(self, job: ShardJob) -> set[int]:
        """Numbers of the samples that an earlier run, or this one, has finished."""
        return {number for base in self._bases(job) for number in numbers_in(base)}

    def _bases(self, job: ShardJob) -> list[str]:
        return [base for base in self.folder.names(_folder(job)) if _NAME.fullmatch(base)]

    def put(self, job: ShardJob, table: pa.Table) -> None:
        """Stage finished samples: rows of STAGED_SCHEMA, those of one sample together."""
        for base, part in self.write(job, table):
            self.add(job, part, base)

    def write(self, job: ShardJob, table: pa.Table) -> list[tuple[str, pa.Table]]:
        """Write finished samples that `add` is told of later; the files and what is in each.

        Moments go from the table's memory into the file.
        """
        self._begun_shards().add(job.name)
        written = []
        for base, part in _named_parts(table):
            with (
                self.folder.writing(f"{_folder(job)}/{base}") as stream,
                pa.ipc.new_file(stream, STAGED_SCHEMA) as writer,
            ):
                writer.write_table(part)
            written.append((base, part))
        return written

    def add(self, job: ShardJob, table: pa.Table, base: str) -> None:
        """Count samples as finished.

        Args:
            job: the job that they are of.
            table: their rows.
            base: the file that they were written to; empty holds the table itself in memory, for a
                commit that follows at once.
        """
        if not base:
            self._held[_folder(job)] = table
        self._count(self.samples(job), table.select(_LIGHT).to_pylist(), base)

    @staticmethod
    def _count(samples: dict[int, StagedSample], rows: list[Row], base: str) -> None:
        begun: dict[int, StagedSample] = {}
        for place, row in enumerate(rows):
            begun.setdefault(row["number"], StagedSample([], Place(base, place))).rows.append(row)
        for number, sample in begun.items():
            samples.setdefault(number, sample)

    def samples(self, job: ShardJob) -> dict[int, StagedSample]:
        """The finished samples by number.

        They are read from the folder once and then held in memory.
        """
        if _folder(job) not in self._samples:
            samples: dict[int, StagedSample] = {}
            bases = self._bases(job) if job.name in self._begun_shards() else []
            light = map_at_once(lambda b: self._light_rows(job, b), bases, self.folder.threads)
            for base, rows in zip(bases, light, strict=True):
                self._count(samples, rows, base)
            self._samples[_folder(job)] = samples
        return self._samples[_folder(job)]

    def _begun_shards(self) -> set[str]:
        # Listed once: most shards have nothing staged, and asking a store for each would take a
        # request. What is staged of a shard afterwards, its one writer stages.
        if not self._begun:
            # Of two threads that come at once, both go on with the set of one.
            self._begun.setdefault(STAGING, set(self.shards()))
        return self._begun[STAGING]

    def _light_rows(self, job: ShardJob, base: str) -> list[Row]:
        name = f"{_folder(job)}/{base}"
        fields = [STAGED_SCHEMA.get_field_index(column) for column in _LIGHT]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        with self.folder.failing("read", name), self.folder.open(name) as file:
            table = pa.ipc.open_file(file, options=options).read_all()
            return list(table.select(_LIGHT).to_pylist())

    def groups(self, job: ShardJob, places: Sequence[Place]) -> Iterator[pa.Table]:
        """Staged rows in this order, as tables of LATENT_SCHEMA, each for one row group.

        They are views of the staged files, a few of which are opened at a time.
        """
        rows: list[pa.Table] = []
        for row in self._rows(job, places):
            rows.append(row)
            if len(rows) >= rows_per_group(_moments_bytes(row)):
                yield pa.concat_tables(rows).cast(LATENT_SCHEMA)
                rows = []
        if rows:
            yield pa.concat_tables(rows).cast(LATENT_SCHEMA)

    def _rows(self, job: ShardJob, places: Sequence[Place]) -> Iterator[pa.Table]:
        """One table of one row for each place."""
        most = 2 * self.folder.threads if self.folder.threads > 1 else _MAPPED_FILES
        for part in _parts(places, most):
            bases = sorted({place.base for place in part} - {""})
            read = map_at_once(lambda b: self._table(job, b), bases, self.folder.threads)
            tables = dict(zip(bases, read, strict=True))
            if _folder(job) in self._held:
                tables[""] = self._held[_folder(job)].select(LATENT_SCHEMA.names)
            for base, row in part:
                yield tables[base].slice(row, 1)

    def _table(self, job: ShardJob, base: str) -> pa.Table:
        view = self.folder.view(f"{_folder(job)}/{base}")
        return pa.ipc.open_file(pa.BufferReader(view)).read_all().select(LATENT_SCHEMA.names)

    def end(self, job: ShardJob, summary: ShardSummary) -> None:
        """Keep what the reader says at the shard's end."""
        self._begun_shards().add(job.name)
        self.folder.write(f"{_folder(job)}/end.json", json.dumps(asdict(summary)).encode())
        self.note_end(job, summary)

    def note_end(self, job: ShardJob, summary: ShardSummary) -> None:
        """Hold in memory what the reader says at the shard's end, for a commit that follows."""
        self._summaries[_folder(job)] = summary

    def summary(self, job: ShardJob) -> ShardSummary | None:
        """What the reader said at the shard's end; None if it has not come there."""
        if _folder(job) not in self._summaries:
            summary = None
            if job.name in self._begun_shards():
                try:
                    values = json.loads(self.folder.read(f"{_folder(job)}/end.json"))
                    summary = ShardSummary(**values)
                except FileNotFoundError:
                    summary = None
            self._summaries[_folder(job)] = summary
        return self._summaries[_folder(job)]

    def forget(self, job: ShardJob) -> None:
        """Remove what is held and staged of a finished job."""
        self._samples.pop(_folder(job), None)
        self._held.pop(_folder(job), None)
        self._summaries.pop(_folder(job), None)
        if job.name in self._begun_shards():
            self.sweep(job.name)
            self._begun_shards().discard(job.name)

    def sweep(self, shard: str) -> None:
        """Remove all that is staged of a finished shard."""
        self.folder.remove_folder(f"{STAGING}/{shard}")


def _folder(job: ShardJob) -> str:
    # The digest alone would not do: two shards may have one size and one time.
    return f"{STAGING}/{job.name}/{job.digest}"


def _parts(places: Sequence[Place], most: int) -> Iterator[list[Place]]:
    """The places in order, cut so that each part is in at most so many files."""
    part: list[Place] = []
    bases: set[str] = set()
    for place in places:
        if place.base not in bases and len(bases) == most:
            yield part
            part, bases = [], set()
        part.append(place)
        bases.add(place.base)
    if part:
        yield part


def _moments_bytes(row: pa.Table) -> int:
    """Bytes of the moments of a table of one row."""
    sizes = (pc.binary_length(row[name])[0].as_py() for name in MOMENTS)
    return sum(size or 0 for size in sizes)


def _named_parts(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """A table of samples as files: base name and rows of each; the numbers decide the names."""
    numbers = table["number"].to_pylist()
    name = _ranges(sorted(set(numbers)))
    if len(name) <= _NAME_CHARS:
        yield f"{name}.arrow", table
        return
    # The rows of a sample stay together.
    middle = numbers.index(numbers[len(numbers) // 2])
    middle = middle or numbers.count(numbers[0])
    yield from _named_parts(table.slice(0, middle))
    yield from _named_parts(table.slice(middle))


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, as a text.

    >>> _ranges([3, 4, 5, 9])
    '00000003-00000005_00000009'
    >>> sorted(numbers_in("00000003-00000005_00000009.arrow"))
    [3, 4, 5, 9]
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return "_".join(f"{a:08d}" if a == b else f"{a:08d}-{b:08d}" for a, b in ranges)


def numbers_in(base: str) -> set[int]:
    """The numbers of the samples in a staged file, from its base name."""
    numbers: set[int] = set()
    for text in base.removesuffix(".arrow").split("_"):
        first, _, last = text.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
