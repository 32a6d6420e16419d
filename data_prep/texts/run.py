"""A run of `prepare --only text`: which shards are left, the run in one process, what came of it.

May be killed at any moment and run again: shards whose file stands are not encoded twice. Knows
nothing of Ray, and imports torch only to encode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data_prep.latents.index import current_manifests
from data_prep.ledger.locks import lock_output, lock_writing
from data_prep.ledger.manifest import FOLDED_FROM, fold_manifests
from data_prep.progress import Progress
from data_prep.storage.folder import Folder
from data_prep.storage.location import Location, absolute
from data_prep.storage.store import open_folder
from data_prep.texts.index import TextIndex
from data_prep.texts.records import TEXTS, EncoderIdentity, Forms, TextSettings
from data_prep.texts.write import ShardTexts, TextWriter, shards_left
from flow.text_spec import TextSpec

WriteShards = Callable[[str, TextSettings, list[str]], Iterable[ShardTexts]]
"""Writes the files of shards (names) of a dataset; yields what became of each as it is done."""


@dataclass(frozen=True)
class TextReport:
    """The encoded prompts of a dataset, and what a run did for them."""

    out: str
    shards: int
    """Shards of the dataset; all of them have their prompts now."""
    shards_now: int
    """Shards whose file this run wrote."""
    clips: int
    """Clips and images whose captions they are."""
    prompts: int
    """Distinct prompts of each shard, added up."""
    encoded_now: int
    """Prompts that this run encoded."""
    taken_over: int
    """Prompts in files that this run wrote whose vectors stood."""
    size_bytes: int
    """Of the vectors and what is stored beside them."""
    seconds: float
    """Wall time of the run."""


def text_settings(spec: TextSpec, forms: Forms) -> TextSettings:
    """Encoder and forms of a run; the encoder's weights are looked for on this machine.

    Raises:
        TextError: they are neither here nor where the spec says.
    """
    identity = EncoderIdentity.of(spec)
    if not identity.weights:
        from flow.text import build_text_encoder

        # It is loaded here once, so that a hub is asked for it, and by one process only.
        build_text_encoder(spec)
        identity = EncoderIdentity.of(spec)
    return TextSettings(identity, forms)


def texts_left(out: Location, settings: TextSettings) -> int:
    """How many shards a run would still have to write; writes nothing. Raises as `shards_left`."""
    return len(shards_left(open_folder(absolute(out)), settings))


def prepare_texts(
    out: Location,
    settings: TextSettings,
    *,
    write_shards: WriteShards | None = None,
    progress: Progress | None = None,
) -> TextReport:
    """Captions → encoded prompts, for every finished shard of a dataset.

    Args:
        out: folder of latents, path or URI.
        settings: encoder and forms; those of an earlier run are replaced, and vectors of the same
            encoder taken over.
        write_shards: who does the work; by default this process, shard by shard.
        progress: called as shards are done.

    Raises:
        LatentDatasetError: nothing was prepared there.
        LedgerError: another run holds the output, or a manifest is damaged.
        TextError: no encoder, one of other weights, or a vector that fp16 does not hold.
        StorageError: the disk or store failed; run the same command again when it is well.
    """
    began = time.monotonic()
    folder = open_folder(absolute(out))
    with lock_output(folder):
        fold_manifests(folder, FOLDED_FROM)
        left = shards_left(folder, settings)
        # First, so that no reader takes a shard of the new settings for one of the old.
        settings.write(folder)
        done: list[ShardTexts] = []
        work = (write_shards or written_here)(folder.location, settings, left) if left else ()
        for result in work:
            done.append(result)
            if progress is not None:
                progress(len(done), len(left))
        fold_manifests(folder)
        return _report(folder, done, time.monotonic() - began)


def written_here(out: str, settings: TextSettings, shards: list[str]) -> Iterator[ShardTexts]:
    """Write the files of shards in this process."""
    with lock_writing(open_folder(out)) as still_ours:
        writer = TextWriter(out, settings, still_ours=still_ours)
        yield from map(writer.write, shards)


def _report(folder: Folder, done: list[ShardTexts], seconds: float) -> TextReport:
    manifests = list(current_manifests(folder))
    entries = [manifest.texts for manifest in manifests if manifest.texts is not None]
    TextIndex.open(folder, entries)
    sizes = folder.sizes(TEXTS)
    return TextReport(
        out=folder.where(),
        shards=len(manifests),
        shards_now=len(done),
        clips=sum(manifest.captions.rows for manifest in manifests),
        prompts=sum(entry.rows for entry in entries),
        encoded_now=sum(result.encoded for result in done),
        taken_over=sum(result.taken_over for result in done),
        size_bytes=sum(sizes.get(entry.path.partition("/")[2], 0) for entry in entries),
        seconds=seconds,
    )
