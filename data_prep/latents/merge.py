"""Datasets of one recipe as one dataset: what a single run over all their shards would have made.

Every file of a finished shard is linked, copied by the store, or streamed
(`data_prep.storage.transfer`); then its manifest is written. Killed and run again, it goes on. What
is not finished in a source is left out; `prepare` into the merged dataset makes it.

Shards of one name and of different content are named as one run over all would have named them
(`data_prep.sources.find.name_shards`): `0` of /x and `0` of /y become `x__0` and `y__0`. A shard
that several sources hold alike is taken once. Knows nothing of Ray or torch.

    MergeError(FlowreelError, ValueError)   datasets that are not of one kind, or a wrong output
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from data_prep.latents.duplicates import MASK_NAME, write_mask
from data_prep.latents.index import LatentIndex, current_manifests, manifests_digest
from data_prep.latents.records import (
    INFO_NAME,
    STATUS_SCHEMA,
    read_info_values,
    stored_rows,
    write_rows,
)
from data_prep.ledger.locks import lock_output, lock_writing
from data_prep.ledger.manifest import (
    FileEntry,
    Manifest,
    Manifests,
    fold_manifests,
    remove_manifest,
    write_manifest,
)
from data_prep.progress import Progress
from data_prep.sources.find import name_shards
from data_prep.sources.listing import ShardError
from data_prep.storage.folder import Folder, map_at_once
from data_prep.storage.location import Location, absolute
from data_prep.storage.store import open_folder
from data_prep.storage.transfer import Way, counted, transfer
from data_prep.texts.records import SETTINGS_NAME
from flowreel.errors import FlowreelError
from flowreel.values import flattened, sha256_of

_RECIPES = ("prepare.json", "recipe.yaml")
"""The settings as they were given, beside the data."""
_AT_ONCE = 64


class MergeError(FlowreelError, ValueError):
    """These datasets cannot be merged, or not there."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge left and did."""

    out: str
    shards: int
    """Shards of the merged dataset."""
    records: int
    """Records of latents in it."""
    shards_now: int
    """Shards that this call brought; the others stood."""
    renamed: dict[str, str] = field(default_factory=dict)
    """The new name of each shard that was renamed, by its source."""
    files: dict[str, int] = field(default_factory=dict)
    """Files that this call linked, had copied by the store, and streamed."""


class _Shard(NamedTuple):
    """A finished shard of a source, and what it is called in the merged dataset."""

    folder: Folder
    manifest: Manifest
    name: str


def merge_latents(
    sources: Sequence[Location], out: Location, *, progress: Progress | None = None
) -> MergeReport:
    """Make one dataset of several that were prepared with the same settings.

    Args:
        sources: folders that `prepare` wrote, paths or URIs.
        out: folder of the merged dataset; empty, or what an earlier call left there.
        progress: called as shards are there.

    Raises:
        MergeError: settings, codec, format or captioner differ; or `out` is no place for them.
        LatentDatasetError: no dataset in a source.
        LedgerError: a manifest is damaged, or another run writes to `out`.
        StorageError: a disk or store failed; run the same command again when it is well.
    """
    folders = [open_folder(absolute(source)) for source in sources]
    target = open_folder(absolute(out))
    _check_places(folders, target)
    digests = [manifests_digest(folder) for folder in folders]
    held = [list(current_manifests(folder)) for folder in folders]
    _check_kinds(folders, held)
    shards = _named(folders, held)
    ways: list[Way] = []
    brought = 0
    with lock_output(target):
        with lock_writing(target) as still_ours:
            _begin(folders[0], target, shards)
            for done, found in enumerate(_bring_all(target, shards, still_ours), 1):
                brought += found is not None
                ways += found or []
                if progress is not None:
                    progress(done, len(shards))
        fold_manifests(target)
        index = LatentIndex.open(target.location)
        _mask(target)
    for folder, digest in zip(folders, digests, strict=True):
        if manifests_digest(folder) != digest:
            raise MergeError(
                f"{folder.where()} changed while it was merged; run the same command again when "
                "nothing writes to it"
            )
    return MergeReport(
        out=target.where(),
        shards=len(shards),
        records=len(index),
        shards_now=brought,
        renamed={s.manifest.source: s.name for s in shards if s.name != s.manifest.shard},
        files=counted(ways),
    )


def _check_places(folders: Sequence[Folder], target: Folder) -> None:
    locations = [folder.location.rstrip("/") for folder in folders]
    if len(locations) < 2 or len(set(locations)) < len(locations):
        raise MergeError(
            f"{len(set(locations))} datasets are given; give two or more, each of them once"
        )
    if target.location.rstrip("/") in locations:
        raise MergeError(f"{target.where()} is one of the datasets; merge into another folder")


def _check_kinds(folders: Sequence[Folder], held: Sequence[Sequence[Manifest]]) -> None:
    """Settings, codec, format and captioner are the same, or every difference is named."""
    infos = [flattened(read_info_values(folder.location)) for folder in folders]
    digests = [{manifest.caption_digest for manifest in manifests} for manifests in held]
    for folder, info, own in zip(folders[1:], infos[1:], digests[1:], strict=True):
        changes = _differences(infos[0], info)
        if own and digests[0] and own != digests[0]:
            recipes = _differences(*(_captioner(each) for each in (folders[0], folder)))
            changes += recipes or [f"captioner: {min(digests[0])!r} → {min(own)!r}"]
        if changes:
            raise MergeError(
                f"{folders[0].where()} and {folder.where()} were not prepared alike "
                f"({', '.join(changes)}); prepare one of them with the other's recipe: --redo "
                "makes anew what differs, --only captions the captions"
            )


def _differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
    return [f"{name}: {first.get(name)!r} → {other.get(name)!r}" for name in names]


def _captioner(folder: Folder) -> dict[str, Any]:
    """The settings of a dataset's captioner, where its recipe stands."""
    if not folder.exists(_RECIPES[0]):
        return {}
    return flattened({"captioner": json.loads(folder.read(_RECIPES[0])).get("captioner", {})})


def _named(folders: Sequence[Folder], held: Sequence[Sequence[Manifest]]) -> list[_Shard]:
    """Every finished shard of the sources under its name in the merged dataset, sorted."""
    found: dict[str, list[_Shard]] = {}
    for folder, manifests in zip(folders, held, strict=True):
        for manifest in manifests:
            _check_paths(folder, manifest)
            alike = found.setdefault(manifest.shard, [])
            if not any(_same(manifest, shard.manifest) for shard in alike):
                alike.append(_Shard(folder, manifest, manifest.shard))
    clashing = [shard for alike in found.values() if len(alike) > 1 for shard in alike]
    if not clashing:
        return [found[name][0] for name in sorted(found)]
    new_names = _names_by_source([s for alike in found.values() for s in alike], clashing)
    shards = [alike[0] for alike in found.values() if len(alike) == 1]
    shards += [shard._replace(name=new_names[shard.manifest.source]) for shard in clashing]
    twice = [name for name, count in Counter(s.name for s in shards).items() if count > 1]
    if twice:
        raise MergeError(
            f"two shards would be called {twice[0]!r} ({len(twice)} such names); prepare one of "
            "the datasets again from a folder of another name"
        )
    return sorted(shards, key=lambda shard: shard.name)


def _names_by_source(shards: Sequence[_Shard], clashing: Sequence[_Shard]) -> dict[str, str]:
    try:
        names = name_shards([shard.manifest.source for shard in shards])
    except ShardError as error:
        first = clashing[0].manifest
        raise MergeError(
            f"shard {first.shard!r} of {first.source} was prepared twice, from different content "
            f"({len(clashing)} such shards); prepare it again in one of the datasets"
        ) from error
    return {source: name for name, source in names.items()}


def _same(one: Manifest, other: Manifest) -> bool:
    """Whether two shards hold the same, made from the same input."""
    return one.sha256 == other.sha256 and one.files == other.files


def _check_paths(folder: Folder, manifest: Manifest) -> None:
    """A manifest may name files of its own dataset only."""
    for entry in manifest.files:
        kind, _, base = entry.path.partition("/")
        if kind != entry.kind or not base or "/" in base or base.startswith("."):
            raise MergeError(
                f"the manifest of shard {manifest.shard!r} in {folder.where()} names "
                f"{entry.path!r}, which is no file of {entry.kind}; prepare the shard again"
            )


def _begin(first: Folder, target: Folder, shards: Sequence[_Shard]) -> None:
    """Write what is common to all shards, unless it stands."""
    info = first.read(INFO_NAME)
    if target.exists(INFO_NAME) and target.read(INFO_NAME) != info:
        raise MergeError(f"{target.where()} holds another dataset; merge into an empty folder")
    others = set(Manifests(target).shards()) - {shard.name for shard in shards}
    if others:
        raise MergeError(
            f"{target.where()} holds shards that none of the datasets has, such as "
            f"{min(others)!r}; merge into an empty folder, with it as one more dataset"
        )
    names = (*_RECIPES, SETTINGS_NAME, INFO_NAME)
    for name, data in ((n, first.read(n)) for n in names if first.exists(n)):
        if not target.exists(name) or target.read(name) != data:
            target.write(name, data)


def _bring_all(
    target: Folder,
    shards: Sequence[_Shard],
    still_ours: Callable[[], None],
) -> Iterator[list[Way] | None]:
    """Bring the shards in order; how their files went, None of a shard that stood already."""
    standing = Manifests(target)

    def bring(shard: _Shard) -> list[Way] | None:
        old = standing.get(shard.name)
        if old is not None and _same_but_for_name(old, shard.manifest):
            return None
        return _bring(target, shard, old, still_ours)

    threads = max(target.threads, *(shard.folder.threads for shard in shards)) if shards else 1
    for start in range(0, len(shards), _AT_ONCE):
        yield from map_at_once(bring, shards[start : start + _AT_ONCE], threads)


def _same_but_for_name(old: Manifest, manifest: Manifest) -> bool:
    """Whether a shard that stands came from this one; a new name changes its status rows."""
    contents = [
        [(e.kind, e.bucket, e.rows, e.sha256) for e in m.files if e.kind != "status"]
        for m in (old, manifest)
    ]
    one, other = (replace(m, shard="", files=()) for m in (old, manifest))
    return contents[0] == contents[1] and one == other


def _bring(
    target: Folder, shard: _Shard, old: Manifest | None, still_ours: Callable[[], None]
) -> list[Way]:
    """Bring one shard's files, and write its manifest last of all."""
    still_ours()
    if old is not None:
        remove_manifest(target, shard.name)
    files: list[FileEntry] = []
    ways: list[Way] = []
    for entry in shard.manifest.files:
        path = _path(shard, entry)
        if path != entry.path and entry.kind == "status":
            files.append(_renamed_status(target, shard, entry, path))
            ways.append("streamed")
        else:
            ways.append(transfer(shard.folder, entry.path, target, path, entry.sha256))
            files.append(replace(entry, path=path))
    still_ours()
    write_manifest(target, replace(shard.manifest, shard=shard.name, files=tuple(files)))
    new_paths = {entry.path for entry in files}
    for entry in old.files if old is not None else ():
        if entry.path not in new_paths:
            target.remove(entry.path)
    return ways


def _path(shard: _Shard, entry: FileEntry) -> str:
    """Where a file of the shard lies in the merged dataset."""
    base, old = entry.path.partition("/")[2], shard.manifest.shard
    if shard.name == old:
        return entry.path
    tail = base.removeprefix(old) if base.startswith(f"{old}.") else f".{base}"
    return f"{entry.kind}/{shard.name}{tail}"


def _renamed_status(target: Folder, shard: _Shard, entry: FileEntry, path: str) -> FileEntry:
    """The status rows of a shard under its new name, which they say."""
    rows = stored_rows(shard.folder, entry.path)
    with target.replacing(path) as partial:
        write_rows(partial, ({**row, "shard": shard.name} for row in rows), STATUS_SCHEMA)
        digest = sha256_of(partial)
    return replace(entry, path=path, sha256=digest)


def _mask(target: Folder) -> None:
    """The mask of near-duplicates over all records, where the recipe asks for one."""
    bits = None
    if target.exists(_RECIPES[0]):
        bits = json.loads(target.read(_RECIPES[0])).get("duplicate_bits")
    if bits is None:
        target.remove(MASK_NAME)
    else:
        write_mask(target, bits)
