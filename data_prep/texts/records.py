"""Encoded prompts on disk: the settings they were made with, and their rows.

A prompt is what the model reads: a caption in one of the forms of its template. `settings.json`
says which forms the clips of each bucket have. A row holds the vectors of the tokens that are
there, in fp16, and names the encoder that made them. Knows nothing of torch or Ray.

    TextError (`flow.text_spec`)   settings of another format, vectors that fp16 cannot hold
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from data_prep.storage.folder import Folder
from flow.prompt import fill_form
from flow.text_spec import TextError, TextSpec, weights_digest
from flowreel.values import digest_of

TEXT_FORMAT = 1
TEXTS = "texts"
"""The folder of encoded prompts, below a dataset."""
SETTINGS_NAME = f"{TEXTS}/settings.json"

TEXT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(32), nullable=False),  # SHA-256 of the prompt
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("encoder", pa.string(), nullable=False),  # EncoderIdentity.digest
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("vectors", pa.large_binary(), nullable=False),  # fp16 [tokens, E]
    ]
)

Forms = Mapping[str, tuple[str, ...]]
"""By bucket (FRAMESxHEIGHTxWIDTH): the forms of a prompt, as `flow.prompt.fill_form` fills them."""


def prompt_id(prompt: str) -> bytes:
    """The SHA-256 of a prompt, 32 bytes."""
    return hashlib.sha256(prompt.encode()).digest()


@dataclass(frozen=True)
class EncoderIdentity:
    """What tells one text encoder from another.

    Attributes:
        spec: kind, length, width, and where the weights were.
        weights: digest of the weights; empty where they are not at hand.

    >>> hashed = EncoderIdentity.of(TextSpec("hashed", length=6, dim=16))
    >>> hashed.difference(EncoderIdentity.of(TextSpec("hashed", length=8, dim=16)))
    'text.length is 6 there and 8 here'
    """

    spec: TextSpec
    weights: str

    @classmethod
    def of(cls, spec: TextSpec) -> EncoderIdentity:
        """The encoder that a spec names; reads all of its weights, if they are on this machine."""
        return cls(spec, weights_digest(spec))

    @property
    def digest(self) -> str:
        """What rows name it by; the path is not in it, for the weights decide."""
        spec = self.spec
        return digest_of([spec.kind, spec.length, spec.dim, self.weights])

    def difference(self, other: EncoderIdentity) -> str:
        """How another encoder differs from this one; empty where it is the same.

        Where weights are not at hand, their path has to be the same.
        """
        names = ["kind", "length", "dim"]
        if not (self.weights and other.weights):
            names.append("path")
        for name in names:
            there, here = getattr(self.spec, name), getattr(other.spec, name)
            if there != here:
                return f"text.{name} is {there} there and {here} here"
        if self.weights and other.weights and self.weights != other.weights:
            return f"its weights are {self.weights} there and {other.weights} here"
        return ""


@dataclass(frozen=True)
class TextSettings:
    """What the encoded prompts of a dataset are made with.

    Attributes:
        encoder: what made the vectors.
        forms: the prompts that there are, by bucket.

    >>> encoder = EncoderIdentity.of(TextSpec("hashed", length=6, dim=16))
    >>> settings = TextSettings(encoder, {"9x64x64": ("A video:\\n{caption}\\n",)})
    >>> sorted(settings.prompts("9x64x64", ["a cat", ""]))
    ['A video:\\n\\n', 'A video:\\na cat\\n']
    >>> settings.lacking({"9x64x64": ("An image:\\n{caption}\\n",)})
    {'9x64x64': ('An image:\\n{caption}\\n',)}
    """

    encoder: EncoderIdentity
    forms: Forms

    @property
    def digest(self) -> str:
        """Of all that decides a shard's file, its captions aside."""
        forms = {bucket: sorted(of) for bucket, of in self.forms.items()}
        return digest_of([TEXT_FORMAT, self.encoder.digest, forms])

    def prompts(self, bucket: str, captions: list[str]) -> Iterator[str]:
        """Captions in every form that clips of a bucket have."""
        for form in self.forms.get(bucket, ()):
            for caption in captions:
                yield fill_form(form, caption)

    def lacking(self, forms: Forms) -> dict[str, tuple[str, ...]]:
        """Those of these forms that are not here, by bucket."""
        missing = {
            b: tuple(f for f in of if f not in self.forms.get(b, ())) for b, of in forms.items()
        }
        return {bucket: of for bucket, of in missing.items() if of}

    def to_json(self) -> bytes:
        """As it is stored."""
        values = {
            "version": TEXT_FORMAT,
            "encoder": {**asdict(self.encoder.spec), "weights": self.encoder.weights},
            "forms": {bucket: sorted(of) for bucket, of in self.forms.items()},
        }
        return json.dumps(values, indent=1, sort_keys=True).encode()

    def write(self, folder: Folder) -> None:
        """Make these the settings of a dataset's texts: files of other settings do not count."""
        data = self.to_json()
        if not folder.exists(SETTINGS_NAME) or folder.read(SETTINGS_NAME) != data:
            folder.write(SETTINGS_NAME, data)

    @classmethod
    def read(cls, folder: Folder) -> TextSettings | None:
        """Those of a dataset; None where it has no texts.

        Raises:
            TextError: they are of another format.
            StorageError: the disk or store fails.
        """
        try:
            values: dict[str, Any] = json.loads(folder.read(SETTINGS_NAME))
        except FileNotFoundError:
            return None
        if values.get("version") != TEXT_FORMAT:
            raise TextError(
                f"{folder.where(SETTINGS_NAME)} has format version {values.get('version')!r}; "
                f"this code reads {TEXT_FORMAT}. Make them again with `flowreel prepare --only "
                "text`"
            )
        encoder = dict(values["encoder"])
        weights = encoder.pop("weights")
        forms = {bucket: tuple(of) for bucket, of in values["forms"].items()}
        return cls(EncoderIdentity(TextSpec(**encoder), weights), forms)
