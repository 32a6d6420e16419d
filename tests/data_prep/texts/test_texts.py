"""Text once: what is read is what the encoder makes, and a run does only what is left to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from data_prep.latents.dataset import LatentDataset
from data_prep.latents.merge import merge_latents
from data_prep.latents.records import CAPTION_SCHEMA, stored_rows, write_rows
from data_prep.ledger.errors import OutputBusy
from data_prep.ledger.locks import lock_output
from data_prep.ledger.manifest import read_manifest, read_manifests, write_manifest
from data_prep.storage.store import open_folder
from data_prep.texts.index import INDEX_NAME, hash_of
from data_prep.texts.read import EncodedTexts, TextsUnfit, open_texts
from data_prep.texts.records import (
    SETTINGS_NAME,
    TEXT_SCHEMA,
    EncoderIdentity,
    Forms,
    prompt_id,
)
from data_prep.texts.run import TextReport, prepare_texts, text_settings, texts_left, written_here
from data_prep.texts.write import ShardTexts, TextWriter, encoded_rows
from flow.prompt import CAPTION, fill_form, format_prompt, prompt_for
from flow.text import HashedText, build_text_encoder, without_padding
from flow.text_spec import TextError, TextSpec, weights_digest
from flowreel.values import sha256_of
from tests.flow.tiny_t5 import byte_t5
from tests.training.world import TEXT, write_dataset

FORMS = {
    "9x64x64": ("A video:\n{caption}\n", "A video:\n(extend) {caption}\n"),
    "1x64x64": ("An image:\n{caption}\n",),
}
VIDEO = FORMS["9x64x64"][0]


def write_two_shards(root: Path) -> Path:
    """A dataset of two shards of the same clips."""
    write_dataset(root, clips=6, images=2)
    folder = open_folder(root)
    manifest = read_manifest(folder, "00000")
    assert manifest is not None
    files = []
    for entry in manifest.files:
        path = entry.path.replace("00000", "00001")
        if (root / entry.path).exists():
            shutil.copy(root / entry.path, root / path)
        files.append(replace(entry, path=path))
    write_manifest(folder, replace(manifest, shard="00001", files=tuple(files)))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_two_shards(tmp_path / "data")


def prepared(root: Path, spec: TextSpec = TEXT, forms: Forms = FORMS) -> TextReport:
    return prepare_texts(root, text_settings(spec, forms))


def files_of(root: Path, kind: str = "texts") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((root / kind).glob("*.parquet"))}


def new_captions(root: Path, shard: str, key: str, synthetic: str) -> None:
    """What `prepare --only captions` leaves: other captions, and a manifest that names their file.

    The entry of the texts stays as it was.
    """
    folder = open_folder(root)
    manifest = read_manifest(folder, shard)
    assert manifest is not None
    rows = stored_rows(folder, manifest.captions.path)
    changed = [{**row, "synthetic": synthetic} if row["key"] == key else row for row in rows]
    write_rows(root / manifest.captions.path, changed, CAPTION_SCHEMA)
    sha256 = sha256_of(root / manifest.captions.path)
    files = [replace(f, sha256=sha256) if f.kind == "captions" else f for f in manifest.files]
    write_manifest(folder, replace(manifest, files=tuple(files)))


def test_a_filled_form_is_the_prompt_of_that_caption() -> None:
    from flow.config import tiny

    flow = tiny(prompt_fps=True, prompt_aspect=True, prompt_noise=True)
    facts: dict[str, Any] = {"num_frames": 9, "height": 64, "width": 96, "fps": 8.0}
    for caption in ("", "a cat", "{caption}", "{}"):
        form = prompt_for(CAPTION, flow, prefix="(extend) ", **facts)
        assert fill_form(form, caption) == prompt_for(caption, flow, prefix="(extend) ", **facts)


def test_what_is_read_is_what_the_encoder_makes_rounded_to_fp16(root: Path) -> None:
    report = prepared(root)
    texts = open_texts(root, TEXT, FORMS)
    captions = ["", "original red", "a red blob", "original cyan", "a cyan blob"]
    prompts = [fill_form(form, text) for of in FORMS.values() for form in of for text in captions]
    prompts = [p for p in prompts if not p.startswith("An image") or "red" not in p]
    vectors = texts.encode(prompts)
    assert torch.equal(vectors, build_text_encoder(TEXT).encode(prompts).half().float())
    # Each shard: 4 words in original and synthetic captions and the empty one in two forms; two
    # images of two words.
    assert report.prompts == len(texts) == 2 * (2 * (2 * 4 + 1) + 2 * 2 + 1)
    assert (report.encoded_now, report.taken_over) == (report.prompts, 0)
    assert report.size_bytes == sum(map(len, files_of(root).values()))


def test_padding_is_not_stored(root: Path) -> None:
    prepared(root)
    for row in pq.read_table(root / "texts/00000.parquet").to_pylist():
        words = without_padding(build_text_encoder(TEXT).encode([row["prompt"]])[0])
        assert row["tokens"] == len(words) <= TEXT.length
        assert len(row["vectors"]) == row["tokens"] * TEXT.dim * 2


def test_a_t5_read_from_files_is_the_t5_within_fp16_rounding(root: Path, tmp_path: Path) -> None:
    spec = TextSpec("t5", 24, 16, path=str(byte_t5(tmp_path / "t5")))
    prepared(root, spec)
    prompts = [fill_form(VIDEO, text) for text in ("", "a red blob", "original cyan")]
    read = open_texts(root, spec, FORMS).encode(prompts)
    made = build_text_encoder(spec).encode(prompts)
    assert torch.allclose(read, made, rtol=2**-11, atol=1e-6)
    assert torch.equal(read.any(-1), made.any(-1))


def test_the_same_captions_give_the_same_bytes_and_a_second_run_does_nothing(
    root: Path, tmp_path: Path
) -> None:
    other = write_two_shards(tmp_path / "other")
    first, _ = prepared(root), prepared(other)
    assert files_of(root) == files_of(other)
    stamps = {p: p.stat().st_mtime_ns for p in root.rglob("*.*")}
    again = prepared(root)
    assert (first.shards_now, again.shards_now, again.encoded_now) == (2, 0, 0)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.*")} == stamps


def test_a_run_that_ends_early_goes_on_with_what_is_left(root: Path, tmp_path: Path) -> None:
    whole = write_two_shards(tmp_path / "whole")
    prepared(whole)

    def dies(out: str, settings: Any, shards: list[str]) -> Iterator[ShardTexts]:
        yield next(iter(written_here(out, settings, shards)))
        raise KeyboardInterrupt

    settings = text_settings(TEXT, FORMS)
    with pytest.raises(KeyboardInterrupt):
        prepare_texts(root, settings, write_shards=dies)
    with pytest.raises(TextsUnfit, match="1 of 2 shards have none"):
        open_texts(root, TEXT, FORMS)
    assert texts_left(root, settings) == 1
    # What a writer leaves that dies between its file and the manifest.
    shutil.copy(root / "texts/00000.parquet", root / "texts/00001.parquet")
    assert prepared(root).shards_now == 1
    assert files_of(root) == files_of(whole)


def test_new_captions_make_a_shard_anew_and_old_vectors_are_taken_over(root: Path) -> None:
    prepared(root)
    new_captions(root, "00001", "clip0000", "something else")
    with pytest.raises(TextsUnfit, match=r"1 of 2 shards.*00001"):
        open_texts(root, TEXT, FORMS)
    report = prepared(root)
    # The new caption in two forms; "a red blob" stays the caption of another clip.
    assert (report.shards_now, report.encoded_now) == (1, 2)
    prompt = fill_form(VIDEO, "something else")
    vectors = open_texts(root, TEXT, FORMS).encode([prompt])
    assert torch.equal(vectors, build_text_encoder(TEXT).encode([prompt]).half().float())


def test_other_forms_are_encoded_and_the_same_prompts_taken_over(root: Path) -> None:
    first = prepared(root)
    report = prepared(root, forms={"9x64x64": (VIDEO, "{caption}")})
    assert (report.shards_now, report.encoded_now) == (2, 2 * 9)
    assert report.taken_over == 2 * 9 < first.prompts
    with pytest.raises(TextsUnfit, match=r"lack 2 forms .*extend"):
        open_texts(root, TEXT, FORMS)


def test_nothing_of_another_encoder_is_taken_over_or_read(root: Path, tmp_path: Path) -> None:
    prepared(root)
    longer = replace(TEXT, length=8)
    with pytest.raises(TextsUnfit, match=r"text\.length is 6 there and 8 here"):
        open_texts(root, longer, FORMS)
    report = prepared(root, longer)
    assert (report.encoded_now, report.taken_over) == (report.prompts, 0)
    assert open_texts(root, longer, FORMS).encode(["An image:\n\n"]).shape == (1, 8, TEXT.dim)


def test_weights_are_compared_and_where_they_are_not_at_hand_their_path(
    root: Path, tmp_path: Path
) -> None:
    folder = byte_t5(tmp_path / "t5")
    spec = TextSpec("t5", 8, 16, path=str(folder))
    prepared(root, spec)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    open_texts(root, replace(spec, path=str(moved)), FORMS)
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    with pytest.raises(TextsUnfit, match="its weights are"):
        open_texts(root, replace(spec, path=str(moved)), FORMS)
    shutil.rmtree(folder)
    assert weights_digest(spec) == ""
    assert len(open_texts(root, spec, FORMS)) > 0
    with pytest.raises(TextsUnfit, match=r"text\.path is"):
        open_texts(root, replace(spec, path="no/such-model"), FORMS)


def test_texts_of_another_format_are_refused_by_number(root: Path) -> None:
    prepared(root)
    values = json.loads((root / SETTINGS_NAME).read_text())
    (root / SETTINGS_NAME).write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(TextError, match="format version 2; this code reads 1"):
        open_texts(root, TEXT, FORMS)


def test_a_prompt_that_is_missing_names_the_command(root: Path) -> None:
    prepared(root)
    with pytest.raises(TextError, match=r"'another'.* --only text --out .*data"):
        open_texts(root, TEXT, FORMS).encode(["another"])


def test_prompts_of_one_hash_are_told_apart(root: Path) -> None:
    """An index that finds every row for every prompt still gives each its own vectors."""
    prepared(root)
    texts = open_texts(root, TEXT, FORMS)
    everywhere = [p for row in all_ids(root) for p in texts.index.places(row)]

    class Colliding:
        def places(self, _: bytes) -> list[Any]:
            return everywhere

    same = EncodedTexts(texts.folder, TEXT, Colliding())  # type: ignore[arg-type]
    prompts = [fill_form(VIDEO, text) for text in ("", "a red blob", "a cyan blob")]
    assert torch.equal(same.encode(prompts), texts.encode(prompts))


def all_ids(root: Path) -> list[bytes]:
    return [r["id"] for p in sorted((root / "texts").glob("*.parquet")) for r in read_rows(p)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    table = pq.read_table(path)
    assert table.schema.equals(TEXT_SCHEMA)
    return list(table.to_pylist())


def test_rows_are_found_by_their_prompts_alone(root: Path) -> None:
    prepared(root)
    for path in sorted((root / "texts").glob("*.parquet")):
        rows = read_rows(path)
        assert [row["id"] for row in rows] == sorted({prompt_id(row["prompt"]) for row in rows})
        assert all(hash_of(row["id"]) == int(row["id"].hex()[:16], 16) for row in rows)


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_what_fp16_does_not_hold_is_refused(value: float) -> None:
    class Broken(HashedText):
        def encode(self, texts: list[str]) -> torch.Tensor:
            return super().encode(texts) * value

    with pytest.raises(TextError, match=r"for the prompt 'a cat'.*65504"):
        list(encoded_rows(["a cat"], Broken(TEXT), text_settings(TEXT, FORMS)))


def test_the_largest_of_fp16_is_kept() -> None:
    class Large(HashedText):
        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.full((len(texts), 6, 16), 65504.0)

    settings = text_settings(TEXT, FORMS)
    (row,) = encoded_rows(["a cat"], Large(TEXT), settings)
    assert row["tokens"] == 6


def test_a_writer_with_other_weights_than_the_run_is_refused(root: Path) -> None:
    settings = text_settings(TEXT, FORMS)
    other = replace(settings, encoder=EncoderIdentity(TEXT, "words-0"))
    with pytest.raises(TextError, match="another than where the run was started"):
        TextWriter(root, other)


def test_another_run_is_refused(root: Path) -> None:
    with lock_output(open_folder(root)), pytest.raises(OutputBusy):
        prepared(root)


def test_latents_and_their_index_are_as_they_were(root: Path) -> None:
    dataset = LatentDataset(root, "all")
    before, ids = (root / "index.arrow").read_bytes(), dataset.ids_digest()
    prepared(root)
    assert LatentDataset(root, "all").ids_digest() == ids
    assert (root / "index.arrow").read_bytes() == before


def test_a_merged_dataset_has_the_texts_of_its_parts(tmp_path: Path) -> None:
    roots = [write_dataset(tmp_path / name, clips=6, images=2) for name in ("a", "b")]
    for number, root in enumerate(roots):
        # Shards of one name and of other content.
        folder = open_folder(root)
        (manifest,) = read_manifests(folder)
        source = f"/{root.name}/00000.tar"
        write_manifest(folder, replace(manifest, source=source, sha256=str(number)))
        new_captions(root, "00000", "clip0000", f"only in {root.name}")
        # A manifest made by hand names a file of status rows that is not there.
        (manifest,) = read_manifests(folder)
        files = tuple(f for f in manifest.files if f.kind != "status")
        status = replace(manifest.status, path="status/00000.parquet")
        write_status(root)
        write_manifest(folder, replace(manifest, files=(status, *files)))
        prepared(root)
    merge_latents(roots, tmp_path / "merged")
    assert texts_left(tmp_path / "merged", text_settings(TEXT, FORMS)) == 0
    texts = open_texts(tmp_path / "merged", TEXT, FORMS)
    prompts = [fill_form(VIDEO, f"only in {name}") for name in ("a", "b")]
    assert torch.equal(
        texts.encode(prompts), build_text_encoder(TEXT).encode(prompts).half().float()
    )


def write_status(root: Path) -> None:
    from data_prep.latents.records import STATUS_SCHEMA

    (root / "status").mkdir(exist_ok=True)
    write_rows(root / "status/00000.parquet", [], STATUS_SCHEMA)


def test_a_damaged_index_is_made_again(root: Path) -> None:
    prepared(root)
    made = (root / INDEX_NAME).read_bytes()
    (root / INDEX_NAME).write_bytes(made[: len(made) // 2])
    prompt = format_prompt("", fps=0)
    assert open_texts(root, TEXT, FORMS).encode([prompt]).shape == (1, 6, 16)
    assert (root / INDEX_NAME).read_bytes() == made
