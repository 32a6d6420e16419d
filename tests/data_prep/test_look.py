"""A look at a sample says what a run makes of it, and what would keep it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.clips.decode import DecodeStage
from data_prep.config import FilterConfig, PrepareConfig
from data_prep.look import keys_in, look_at
from data_prep.look_record import Look
from data_prep.sources.config import SourceConfig
from data_prep.sources.listing import ShardError
from data_prep.sources.samples import write_shard
from data_prep.stages import FilterStage, run_stage
from flow.codec_factors import read_factors
from media.pixels import PQ
from media.read import VideoReader
from media.write import encode_png
from pipeline.recipes import load_recipe
from tests.data_prep.bad_media import moving, video, with_bars
from tests.data_prep.in_process import decode_row, prepare_locally
from tests.data_prep.sources.test_samples import tar_of
from tests.data_prep.test_stages import bad_samples
from tests.media import odd_videos as odd
from tests.places import TINY_CODEC

FACTORS = read_factors(TINY_CODEC)


def odd_samples() -> list[dict[str, Any]]:
    """Bad and good of many kinds, in the form that `write_shard` takes."""
    late = odd.video(count=60, times=lambda n: n + (25_000 if n > 29 else 0))
    dark = [*moving(12), *([np.zeros_like(moving(1)[0])] * 12)]
    videos = {
        "edit_list": odd.cut_with_edit_list(), "keyframe": odd.without_first_keyframe(),
        "sizes": odd.size_changes(first=1), "interlaced": odd.interlaced(), "hdr": odd.hdr(PQ),
        "gap": late, "damaged": odd.damaged(), "dark": video(dark), "long": video(moving(60)),
        "boxed": video(with_bars(moving(20), 12, 16)),
    }  # fmt: skip
    return [*bad_samples(), *({"__key__": key, "mp4": data} for key, data in videos.items())]


@pytest.fixture(scope="module")
def strict(config: PrepareConfig) -> PrepareConfig:
    """Every filter on, two windows of each video, two lengths and two resolutions."""
    filters = FilterConfig(max_black_frames=0.5, static_below=0.1, crop_bars=True)
    bucket = {"resolutions": ("24p", "36p"), "frame_counts": (9, 5), "max_enlargement": 1.0}
    buckets = config.bucket.model_copy(update=bucket)
    changes = {"filters": filters, "windows_per_clip": 2, "bucket": buckets}
    return config.model_copy(update=changes)


def prepared(out: Path) -> tuple[list[dict[str, Any]], dict[tuple[str, int], dict[str, Any]]]:
    """Status rows, and latent rows by key and window."""
    (path,) = (out / "status").glob("*.parquet")
    latents = [
        row
        for file in sorted((out / "latents").glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    return pq.read_table(path).to_pylist(), {(row["key"], row["window"]): row for row in latents}


def assert_same(look: Look, status: dict[str, Any], latents: dict[tuple[str, int], Any]) -> None:
    """A look and what a run has written of the same sample."""
    for name in ("key", "shard", "number", "status", "reason", "detail"):
        assert getattr(look, name) == status[name], (look.key, name)
    kept = {w.number: w for w in look.windows if w.status == "kept"}
    assert set(kept) == {window for key, window in latents if key == look.key}
    for number, window in kept.items():
        row = latents[look.key, number]
        assert window.pts_s == row["pts_s"]
        assert window.frames_digest == row["frames_digest"]


def test_a_look_at_each_sample_of_a_shard_is_what_a_run_makes_of_it(
    strict: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    source = str(tmp_path / "0.tar")
    write_shard(Path(source), odd_samples())
    prepare_locally(strict, [source], tmp_path / "out", codec_dir)
    rows, latents = prepared(tmp_path / "out")
    assert len(rows) == len(odd_samples())
    assert {row["status"] for row in rows} == {"kept", "dropped", "failed"}
    assert sorted(key for key, _, _ in keys_in(source, SourceConfig())) == [
        row["key"] for row in rows
    ]
    looks = [look_at(source, row["key"], strict, FACTORS) for row in rows]
    for look, row in zip(looks, rows, strict=True):
        assert_same(look, row, latents)
    assert {len(w.pts_s) for look in looks for w in look.windows} == {1, 5, 9}
    assert any("too_small" in look.detail for look in looks if look.status == "kept")


def test_a_look_at_a_sample_of_a_damaged_shard_is_what_a_run_makes_of_it(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "0.tar"
    good = video(moving(20))
    tar_of(source, [("a.mp4", good), ("b.mp4", good), ("a.mp4", good), ("cut.mp4", good)])
    whole = source.read_bytes()
    source.write_bytes(whole[: whole.rindex(good) + len(good) // 2])
    prepare_locally(config, [str(source)], tmp_path / "out", codec_dir)
    rows, latents = prepared(tmp_path / "out")
    looks = {key: look_at(str(source), key, config, FACTORS) for key in ("a", "b", "cut")}
    for row in rows:
        if row["reason"] != "duplicate_key":
            assert_same(looks[row["key"]], row, latents)
    assert looks["cut"].reason == "truncated_shard"
    assert (looks["a"].same_key, looks["b"].same_key) == (1, 0)


def test_a_file_by_itself_is_what_a_folder_makes_of_it(
    strict: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.MP4").write_bytes(odd.cut_with_edit_list())
    (folder / "a.txt").write_text("A cut clip.")
    (folder / "b.left.mp4").write_bytes(video(moving(60)))
    (folder / "b.json").write_text(json.dumps({"matching_score": 0.9, "caption": "Two."}))
    (folder / "c.png").write_bytes(encode_png(moving(1)[0]))
    (folder / "d.mp4").write_bytes(video(moving(20)))
    (folder / "d.json").write_text(json.dumps({"matching_score": [0.1]}))
    (folder / "e.gif").write_bytes(b"GIF89a")
    prepare_locally(strict, [str(folder)], tmp_path / "out", codec_dir)
    rows, latents = prepared(tmp_path / "out")
    names = {"a": "a.MP4", "b.left": "b.left.mp4", "c": "c.png", "d": "d.mp4", "e": "e.gif"}
    assert [row["key"] for row in rows] == list(names)
    for row in rows:
        look = look_at(str(folder / names[row["key"]]), None, strict, FACTORS)
        assert_same(look, {**row, "number": look.number, "shard": look.shard}, latents)
    link = tmp_path / "a.mp4"
    link.symlink_to(folder / "a.MP4")
    assert look_at(str(link), None, strict, FACTORS).status == "kept"


def test_the_frames_of_a_window_are_those_of_its_places_and_times(config: PrepareConfig) -> None:
    large = config.bucket.model_copy(update={"height": odd.SIDE, "width": odd.SIDE})
    changed = config.model_copy(update={"bucket": large, "windows_per_clip": 3})
    for name, data, first in (
        ("plain", odd.video(), 0),
        ("cut", odd.cut_with_edit_list(), 25),
        ("late", odd.without_first_keyframe(), 50),
    ):
        look = looked(changed, name, data)
        assert len(look.windows) > 1
        for window in look.windows:
            numbers = [odd.number_in(frame) for frame in window.frames]
            assert numbers == [first + place for place in window.window]
            assert window.pts_s == pytest.approx([place / odd.RATE for place in window.window])


def looked(config: PrepareConfig, key: str, data: bytes, **json_values: Any) -> Look:
    """A look at a sample of a shard that is made for it."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "0.tar"
        write_shard(source, [{"__key__": key, "mp4": data, "json": json_values}])
        return look_at(str(source), key, config, FACTORS)


GOOD = video(moving(20))
BLACK = video([np.zeros((48, 64, 3), np.uint8)] * 20)
WHITE = video([np.full((48, 64, 3), 255, np.uint8)] * 20)
BOXED = video(with_bars(moving(20), 48, 0))
DROPS: dict[str, tuple[dict[str, Any], Callable[[], bytes], dict[str, Any]]] = {
    "low_matching_score": ({}, lambda: GOOD, {"matching_score": 0.1}),
    "not_desirable": ({}, lambda: GOOD, {"desirable_filtering": "still"}),
    "several_shots": ({}, lambda: GOOD, {"shot_boundary_detection": [["0", "1"], ["1", "2"]]}),
    "missing_metadata": ({"missing_metadata": "drop"}, lambda: GOOD, {}),
    "small_area": ({"min_area_pixels": 10_000}, lambda: GOOD, {}),
    "short_duration": ({"min_duration_s": 9.0}, lambda: GOOD, {}),
    "interlaced": ({}, odd.interlaced, {}),
    "low_rate": ({}, lambda: odd.video(count=20, rate=1, time_base=Fraction(1)), {}),
    "gap": ({}, lambda: odd.video(count=20, times=lambda n: n + (9000 if n > 9 else 0)), {}),
    "letterbox": ({"crop_bars": True}, lambda: BOXED, {}),
    "static_clip": ({"static_below": 0.5}, lambda: BLACK, {}),
    "black_frames": ({"max_black_frames": 0.5}, lambda: BLACK, {}),
    "white_frames": ({"max_white_frames": 0.5}, lambda: WHITE, {}),
}
"""Filters, video and json that end in a reason."""


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    with VideoReader() as reader:
        yield reader


@pytest.mark.parametrize("reason", DROPS)
def test_the_setting_that_a_look_names_keeps_what_was_dropped(
    config: PrepareConfig, reader: VideoReader, reason: str
) -> None:
    filters, make, metadata = DROPS[reason]
    strict = config.model_copy(update={"filters": FilterConfig(**filters)})
    data = make()
    look = looked(strict, "a", data, **metadata)
    assert (look.status, look.reason) == ("dropped", reason)
    assert look.windows or look.overview, "even so there is a picture of it"
    option, setting, *_ = look.remedy.split()
    assert option == "--set"
    section = {"bucket": config.bucket.model_dump(), "filters": filters}
    changed = load_recipe("tiny", [f"prepare={json.dumps(section)}", setting]).prepare
    stage = DecodeStage(changed, changed.bucket.all_sizes(FACTORS.space))
    stage.reader = reader
    row = run_stage(stage, decode_row(media=data, metadata=json.dumps(metadata)))
    assert run_stage(FilterStage(changed), row)["status"] == ""


def test_of_a_clip_that_is_too_short_it_says_how_many_frames_fit(config: PrepareConfig) -> None:
    bucket = {**config.bucket.model_dump(), "num_frames": 81}
    for count in (9, 47):
        data = video(moving(count))
        long = load_recipe("tiny", [f"prepare.bucket={json.dumps(bucket)}"])
        look = looked(long.prepare, "a", data)
        assert look.reason == "too_short"
        setting = look.remedy.split()[1]
        fits = load_recipe("tiny", [f"prepare.bucket={json.dumps(bucket)}", setting])
        assert looked(fits.prepare, "a", data).status == "kept"
        counts = [f"prepare.bucket={json.dumps({**bucket, 'frame_counts': [85, 81]})}"]
        assert looked(load_recipe("tiny", counts).prepare, "a", data).remedy.split()[1] == (
            setting.replace("num_frames=", "frame_counts=[") + "]"
        )
        more = fits.prepare.bucket.num_frames + FACTORS.time
        over = load_recipe(
            "tiny", [f"prepare.bucket={json.dumps(bucket)}", f"prepare.bucket.num_frames={more}"]
        )
        assert looked(over.prepare, "a", data).reason == "too_short"


def test_a_reader_is_named_with_its_reason_or_none_is(config: PrepareConfig) -> None:
    avi = looked(config, "a", odd.video(suffix="avi", codec="mpeg4"))
    assert avi.reader == "pyav"
    assert "avi" in avi.reader_why
    assert "counted" in avi.reader_why
    playlist = looked(config, "a", b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n")
    assert (playlist.reader, playlist.reason) == ("", "names_other_files")
    assert "HLS" in playlist.reader_why
    assert not playlist.facts


def test_a_key_that_is_not_there_names_a_near_one(config: PrepareConfig, tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "clip_0001", "mp4": GOOD}])
    with pytest.raises(ShardError, match="did you mean 'clip_0001'"):
        look_at(str(tmp_path / "0.tar"), "clip_001", config, FACTORS)
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"junk" * 999)
    with pytest.raises(ShardError, match="not a readable tar"):
        keys_in(str(junk), SourceConfig())


def test_words_cannot_steer_a_terminal(config: PrepareConfig) -> None:
    look = looked(config, "a", GOOD, caption="red \x1b[31m\u202e text")
    assert look.caption == "red \x1b[31m\u202e text"
    assert all(words.isprintable() for _, words in look.rows())


def test_other_samples_of_a_shard_are_not_read(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.sources.tar_archive import TarArchive

    read: list[str] = []
    inner = TarArchive.read

    def reading(self: TarArchive, member: Any, max_bytes: int) -> bytes | None:
        read.append(member.name)
        return inner(self, member, max_bytes)

    monkeypatch.setattr(TarArchive, "read", reading)
    write_shard(tmp_path / "0.tar", [{"__key__": key, "mp4": GOOD, "txt": key} for key in "abc"])
    look_at(str(tmp_path / "0.tar"), "b", config, FACTORS)
    assert sorted(read) == ["b.mp4", "b.txt"]
