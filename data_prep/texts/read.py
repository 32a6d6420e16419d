"""A text encoder that reads what another one made, so that training needs none of its own.

`open_texts` looks whether a dataset's texts are all that a run asks for: made by its encoder, in
its forms, of the captions as they are now. Only then are they read; what is missing later is an
error. Knows nothing of models or Ray.

    TextError (`flow.text_spec`)
    └── TextsUnfit   there are texts, but not those that are asked for; or there are none
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.latents.index import current_manifests
from data_prep.storage.folder import Folder
from data_prep.storage.location import Location
from data_prep.storage.store import open_folder
from data_prep.texts.index import Place, TextIndex
from data_prep.texts.records import (
    SETTINGS_NAME,
    TEXTS,
    EncoderIdentity,
    Forms,
    TextSettings,
    prompt_id,
)
from data_prep.texts.write import is_made
from flow.text_spec import TextError, TextSpec, weights_digest

if TYPE_CHECKING:
    from torch import Tensor

_OPEN_FILES = 16
_GROUPS_HELD = 16


class TextsUnfit(TextError):
    """The texts of a dataset are not those that are asked for.

    Attributes:
        exist: whether there are any.
    """

    def __init__(self, message: str, *, exist: bool = True) -> None:
        super().__init__(message)
        self.exist = exist

    def __reduce__(self) -> tuple[Any, ...]:
        return _unfit, (str(self), self.exist)


def _unfit(message: str, exist: bool) -> TextsUnfit:
    return TextsUnfit(message, exist=exist)


class EncodedTexts:
    """A `flow.text.TextEncoder` whose vectors are read; get one with `open_texts`.

    Vectors are those of the encoder, rounded to fp16.

    Args:
        folder: the dataset's.
        spec: the encoder that made them.
        index: where they lie.
    """

    def __init__(self, folder: Folder, spec: TextSpec, index: TextIndex) -> None:
        self.folder = folder
        self.spec = spec
        self.index = index
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def size_bytes(self) -> int:
        """Of the whole artefact."""
        return self.folder.size(TEXTS)

    def encode(self, texts: list[str]) -> Tensor:
        """Vectors of the texts, fp32 [B, J, E]; zero where there is no token.

        Raises:
            TextError: a prompt that was not encoded.
            StorageError: the disk or store fails.
        """
        import torch

        out = np.zeros((len(texts), self.spec.length, self.spec.dim), dtype=np.float32)
        for at, text in enumerate(texts):
            vectors_NE = self._vectors(text)
            out[at, : len(vectors_NE)] = vectors_NE
        return torch.from_numpy(out)

    def _vectors(self, prompt: str) -> np.ndarray:
        for place in self.index.places(prompt_id(prompt)):
            row = self._group(place).slice(place.row, 1).to_pylist()[0]
            if row["prompt"] == prompt:
                numbers = np.frombuffer(row["vectors"], dtype="<f2")
                return numbers.reshape(row["tokens"], self.spec.dim)
        raise TextError(
            f"the prompt {prompt[:60]!r} is not among the {len(self)} encoded prompts of "
            f"{self.folder.where()}; make them anew with {command(self.folder.where())}"
        )

    def _group(self, place: Place) -> pa.Table:
        key = place.path, place.group
        if key not in self._groups:
            if place.path not in self._files:
                while len(self._files) >= _OPEN_FILES:
                    self._files.popitem(last=False)[1].close(force=True)
                self._files[place.path] = pq.ParquetFile(self.folder.open(place.path))
            with self.folder.failing("read", place.path):
                self._groups[key] = self._files[place.path].read_row_group(
                    place.group, columns=["prompt", "tokens", "vectors"]
                )
            while len(self._groups) > _GROUPS_HELD:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def command(root: Location) -> str:
    """The command that makes a dataset's texts."""
    return f"`flowreel prepare --only text --out {root} --recipe RECIPE`"


def open_texts(
    root: Location, spec: TextSpec, forms: Forms, *, look_at_weights: bool = True
) -> EncodedTexts:
    """The encoded prompts of a dataset, if they are all that a run will ask for.

    Args:
        root: folder of latents, path or URI.
        spec: the encoder that the run's model reads.
        forms: of its prompts, by bucket.
        look_at_weights: compare the weights too, where they are on this machine; reads them all.

    Raises:
        TextsUnfit: there are none; or they are of another encoder, or lack a form, or a shard.
        TextError: they are of another format.
        StorageError: the disk or store fails.
    """
    folder = open_folder(root)
    settings = TextSettings.read(folder)
    if settings is None:
        raise TextsUnfit(f"{folder.where(SETTINGS_NAME)} is not there", exist=False)
    weights = weights_digest(spec) if look_at_weights else settings.encoder.weights
    difference = settings.encoder.difference(EncoderIdentity(spec, weights))
    if difference:
        raise TextsUnfit(f"they were made by another encoder: {difference}")
    lacking = settings.lacking(forms)
    if lacking:
        bucket, of = next(iter(lacking.items()))
        raise TextsUnfit(
            f"they lack {sum(map(len, lacking.values()))} forms that this run asks for, such as "
            f"{of[0]!r} of bucket {bucket}"
        )
    manifests = list(current_manifests(folder))
    stale = [manifest.shard for manifest in manifests if not is_made(settings, manifest)]
    if stale:
        raise TextsUnfit(
            f"{len(stale)} of {len(manifests)} shards have none of their captions as they are now, "
            f"such as {stale[0]}"
        )
    entries = [manifest.texts for manifest in manifests if manifest.texts is not None]
    return EncodedTexts(folder, settings.encoder.spec, TextIndex.open(folder, entries))
