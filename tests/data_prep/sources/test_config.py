"""Which files of a shard are captions and videos is a setting, and decides what it says alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_prep.config import PrepareConfig
from data_prep.ledger.errors import SettingsChanged
from data_prep.sources.config import SourceConfig
from data_prep.sources.find import find_shards
from data_prep.sources.listing import ShardError
from data_prep.sources.samples import read_shard
from tests.data_prep.bad_media import moving, video
from tests.data_prep.conftest import real_folder
from tests.data_prep.in_process import digests, prepare_locally
from tests.data_prep.sources.test_samples import tar_of


def captions(path: Path, members: dict[str, bytes], **settings: Any) -> list[tuple[str, str, str]]:
    """Key, caption and problem of every sample."""
    tar_of(path / "a.tar", list(members.items()))
    samples = read_shard(str(path / "a.tar"), config=SourceConfig(**settings))
    return [(s.key, s.caption, s.problem) for s in samples]


def test_a_caption_file_may_have_any_suffix(tmp_path: Path) -> None:
    members = {"a.mp4": b"1", "a.cap": b"by hand", "a.txt": b"by a crawl", "b.cap": b"alone"}
    crawled = [("a", "by a crawl", ""), ("b", "", "no_media")]
    assert captions(tmp_path, members) == crawled
    alone = ("b", "alone", "no_media")
    by_hand = [("a", "by hand", ""), alone]
    assert captions(tmp_path, members, caption_suffixes="cap") == by_hand
    assert captions(tmp_path, members, caption_suffixes=["cap", "txt"]) == by_hand
    assert captions(tmp_path, members, caption_suffixes=["txt", "cap"]) == [crawled[0], alone]


def test_an_empty_caption_file_leaves_the_word_to_the_next(tmp_path: Path) -> None:
    record = json.dumps({"caption": "in the json"}).encode()
    members = {"a.mp4": b"1", "a.txt": b" \n", "a.cap": b"here", "b.mp4": b"1", "b.json": record}
    both = captions(tmp_path, members, caption_suffixes=["txt", "cap"])
    assert both == [("a", "here", ""), ("b", "in the json", "")]


def test_the_suffix_of_a_language_is_one_too(tmp_path: Path) -> None:
    members = {"a.b.mp4": b"1", "a.b.en.vtt": b"a car", "a.b.de.vtt": b"ein Auto"}
    for language, caption in (("en", "a car"), ("de", "ein Auto")):
        found = captions(tmp_path, members, caption_suffixes=f"{language}.vtt")
        assert found == [("a.b", caption, "")]


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ("caption", ""),
        ("text", "A car."),
        ("meta.title", "A road."),
        ("meta.title.more", ""),
        (["none", "empty", "meta.title", "text"], "A road."),
        ("a.b", "with a dot"),
        ("several", "First."),
    ],
)
def test_the_field_of_a_caption_may_have_any_name(
    tmp_path: Path, fields: Any, caption: str
) -> None:
    record = {
        "text": "A car.",
        "empty": " ",
        "meta": {"title": "A road."},
        "a.b": "with a dot",
        "several": ["First.", "Second."],
    }
    members = {"a.mp4": b"1", "a.json": json.dumps(record).encode()}
    assert captions(tmp_path, members, caption_fields=fields) == [("a", caption, "")]


def test_several_videos_of_a_key_share_captions_of_any_suffix(tmp_path: Path) -> None:
    members = {"k.cap": b"words", "k.left.mp4": b"1", "k.right.mp4": b"2", "k.right.cap": b"own"}
    shared = captions(tmp_path, members, caption_suffixes="cap")
    assert shared == [("k.left", "words", ""), ("k.right", "own", "")]


def test_videos_may_have_other_suffixes_in_tars_and_folders(tmp_path: Path) -> None:
    config = SourceConfig(video_suffixes=("ts", "mp4"), caption_suffixes="cap")
    loose = tmp_path / "loose"
    loose.mkdir()
    members = {"a.ts": b"1", "a.f230.ts": b"part", "a.cap": b"words", "b.mp4": b"2"}
    for name, data in members.items():
        (loose / name).write_bytes(data)
    tar = tar_of(tmp_path / "a.tar", sorted(members.items()))
    (shard,) = find_shards(str(loose), config)
    for source in (shard, tar):
        samples = [(s.key, s.suffix, s.caption) for s in read_shard(source, config=config)]
        assert samples == [("a", "ts", "words"), ("b", "mp4", "")]
    (loose / "b.mp4").unlink()
    with pytest.raises(ShardError, match="no samples in"):
        find_shards(str(loose))
    assert find_shards(str(loose), config) == [str(loose)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"caption_suffixes": [".txt"]}, "'.txt' is no suffix; .*without the first dot"),
        ({"caption_suffixes": ["TXT"]}, "'TXT' is no suffix; write it in lower case"),
        ({"caption_suffixes": ["mp4"]}, "'mp4' is named twice"),
        ({"caption_suffixes": ["json"]}, "'json' is named twice"),
        ({"video_suffixes": ["png"]}, "'png' is named twice"),
        ({"video_suffixes": ["a.ts"]}, "what follows the last dot"),
        ({"video_suffixes": []}, "at least 1 item"),
    ],
)
def test_suffixes_that_cannot_be_are_refused_with_the_rule(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        SourceConfig(**settings)


def test_captions_of_odd_shards_are_found_by_their_suffixes() -> None:
    folder = real_folder("FLOWREEL_ODD_INPUTS", "odd_inputs")
    source = str(folder / "shards" / "captions.tar")
    before = {s.key: s.caption for s in read_shard(source)}
    config = SourceConfig(caption_suffixes=("txt", "caption", "text"))
    after = {s.key: s.caption for s in read_shard(source, config=config)}
    assert {key for key in after if after[key] != before[key]} == {"capfile", "cls"}
    assert (before["capfile"], before["cls"]) == ("", "")


def test_another_suffix_makes_anew_what_it_changes_and_the_result_is_that_of_a_new_output(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    clips = {f"{n}.mp4": video(moving(20 + n)) for n in range(2)}
    members = {**clips, "0.txt": b"crawled", "0.cap": b"by hand", "1.txt": b"x", "1.cap": b"x"}
    tar = tar_of(tmp_path / "a.tar", list(members.items()))
    other = config.model_copy(update={"source": SourceConfig(caption_suffixes="cap")})
    prepare_locally(config, [tar], tmp_path / "out", codec_dir)
    with pytest.raises(SettingsChanged, match=r"source\.caption_suffixes"):
        prepare_locally(other, [tar], tmp_path / "out", codec_dir)
    prepare_locally(other, [tar], tmp_path / "out", codec_dir, redo=True)
    prepare_locally(other, [tar], tmp_path / "new", codec_dir)
    assert digests(tmp_path / "out") == digests(tmp_path / "new")
    rows = pq.read_table(tmp_path / "out" / "captions" / "a.parquet").to_pylist()
    assert [row["caption"] for row in rows] == ["by hand", "x"]
    assert config.outcome_digest("c") == other.outcome_digest("c")
    assert config.latent_digest("c") != other.latent_digest("c")
