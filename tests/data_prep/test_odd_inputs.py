"""Odd inputs have their right outcome: which frames, which colours, or which status.

The videos of `FLOWREEL_ODD_INPUTS` show four fields of known colours and their frame's number, so
what was cut can be read off. Those that the tests make are of the same kinds, and always at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data_prep.clips.decode import DecodeStage
from data_prep.config import BucketConfig, PrepareConfig
from data_prep.ledger.job import ShardJob
from data_prep.row import Row, frames_of, is_closing, split_windows
from data_prep.stages import FilterStage, read_rows, run_stage
from media.pixels import HLG, PQ
from tests.data_prep.in_process import decode_row
from tests.media import odd_videos as odd

SQUARE = PrepareConfig(
    bucket=BucketConfig(num_frames=17, height=odd.SIDE, width=odd.SIDE, fps=8.0),
    windows_per_clip=8,
)


class Right(NamedTuple):
    """What should become of a video."""

    reason: str = ""
    count: int = odd.COUNT
    """Frames that it shows."""
    seconds: float = 4.0
    first: int = 0
    """Number of its first frame."""
    tolerance: int = 6
    """Of each colour, in levels."""
    mirrored: bool = False


VIDEOS: dict[str, Right] = {
    "control_untagged601.mp4": Right(),
    "cut_edit_list.mp4": Right(count=75, seconds=3.0, first=25),
    "xvid_bframes.avi": Right(),
    "no_first_keyframe.mp4": Right(count=50, seconds=2.0, first=50),
    "resolution_changes.ts.mpg": Right("size_changes"),
    "sar_2to1.mp4": Right(),
    "hdr10_pq.mp4": Right(count=60, seconds=2.4, tolerance=12),
    "interlaced_h264.mp4": Right("interlaced"),
    "mirror_matrix.mp4": Right(mirrored=True),
    "gap_30s.mp4": Right("gap", seconds=34.0),
    "fps1.mp4": Right("low_rate", count=20, seconds=20.0),
    "fps1000.mp4": Right(count=2560, seconds=2.56),
}
MADE: dict[str, tuple[Callable[[], bytes], Right]] = {
    "plain": (odd.video, Right()),
    "edit list": (odd.cut_with_edit_list, Right(count=75, seconds=3.0, first=25)),
    "avi": (lambda: odd.video(suffix="avi", codec="mpeg4", options={"bf": "2"}), Right()),
    "keyframe": (odd.without_first_keyframe, Right(count=50, seconds=2.0, first=50)),
    "size": (lambda: odd.size_changes(first=20), Right("size_changes", count=70, seconds=2.8)),
    "tall": (lambda: odd.tall_pixels(100), Right()),
    "pq": (lambda: odd.hdr(PQ, 60), Right(count=60, seconds=2.4, tolerance=12)),
    "hlg": (lambda: odd.hdr(HLG, 60), Right(count=60, seconds=2.4, tolerance=12)),
    "interlaced": (odd.interlaced, Right("interlaced", count=25, seconds=1.0)),
    "mirrored": (lambda: odd.with_matrix(-1, 0, 0, 1, 100), Right(mirrored=True)),
    "gap": (lambda: odd.with_gap(20), Right("gap", count=40, seconds=31.6)),
    "slow": (
        lambda: odd.video(count=20, rate=1, time_base=Fraction(1)),
        Right("low_rate", count=20, seconds=20.0),
    ),
    "fast": (
        lambda: odd.video(count=525, rate=250, time_base=Fraction(1, 250)),
        Right(count=525, seconds=2.1),
    ),
}


@pytest.fixture(scope="module")
def decoder() -> Iterator[DecodeStage]:
    stage = DecodeStage(SQUARE, SQUARE.bucket.all_sizes(16))
    yield stage
    stage.close()


def assert_right(decoder: DecodeStage, key: str, data: bytes, right: Right) -> None:
    """Hold what the decoding stage makes of a video against what it should be."""
    row = run_stage(decoder, decode_row(key=key, media=data))
    info = decoder.reader.probe(data)
    assert row["reason"] == (right.reason or None)
    assert info.num_frames == right.count
    assert info.duration_s == pytest.approx(right.seconds, abs=0.01)
    if right.reason:
        return
    step_s = right.seconds / right.count
    for part in split_windows(row):
        frames = frames_of(part)[:, :, ::-1] if right.mirrored else frames_of(part)
        pts_s = np.array(part["pts_s"])
        shown = [odd.number_in(frame) for frame in frames]
        assert shown == [(right.first + round(time_s / step_s)) % 256 for time_s in pts_s]
        off_s = np.abs(pts_s - pts_s[0] - np.arange(17) / 8)
        # The last may be wanted just after the last frame.
        assert off_s[-1] <= step_s + 1e-9
        assert off_s[:-1].max() <= step_s / 2 + 1e-9
        for frame in frames:
            off = np.abs(odd.colours_in(frame) - np.array(odd.COLOURS)).max()
            assert off <= right.tolerance


@pytest.mark.parametrize("name", VIDEOS)
def test_the_frames_of_a_video_are_those_that_it_should_show(
    odd_inputs: Path, decoder: DecodeStage, name: str
) -> None:
    path = odd_inputs / "videos" / name
    assert_right(decoder, path.stem, path.read_bytes(), VIDEOS[name])


def test_no_odd_video_is_forgotten(odd_inputs: Path) -> None:
    assert {path.name for path in (odd_inputs / "videos").iterdir()} == set(VIDEOS)


@pytest.mark.parametrize("kind", MADE)
def test_a_made_video_of_every_kind_shows_what_it_should(decoder: DecodeStage, kind: str) -> None:
    make, right = MADE[kind]
    assert_right(decoder, kind, make(), right)


SHARDS: dict[str, dict[str, str]] = {
    "captions.tar": dict.fromkeys(
        ("nul", "long", "white", "multi", "ctrl", "listcap", "jsonlist", "html", "utf16", "sjis",
         "rtl", "nocap", "capfile", "cls"), ""),
    "compressed.tar.xz": {"z1": ""},
    "compressed.tar.zst": {"z1": ""},
    "zst_named_tar.tar": {"z1": ""},
    "concatenated.tar": {"first": "", "second": ""},
    "latin1_keys.tar": {"café": "", "cafè": ""},
    "several_mp4.tar": {"k1.left": "", "k1.right": ""},
    "ytdlp_leftover.tar": {"653c": ""},
    "images.tar": {
        **dict.fromkeys(
            ("cmyk_jpg", "gray8_png", "gray16_png", "rgb16_png", "exif6_jpg", "rgba_png",
             "animated_webp", "animated_png", "palette_trans_png", "UP_jpg", "one_png", "thin_png",
             "mode1_png", "la_png", "jpg_named_png"), ""),
        "anim_gif": "no_media", "pic_bmp": "no_media", "pic_tiff": "no_media",
        "pic_avif": "no_media", "heic_named_jpg": "unreadable_image",
    },
}  # fmt: skip
"""Reason of every sample by shard and key; none: it is kept."""


def rows_of_shard(decoder: DecodeStage, path: Path) -> dict[str, Row]:
    """Every sample of a shard after reading, decoding and filtering, by its key."""
    job = ShardJob(path.name, str(path), "", "", "")
    rows = {}
    for read in read_rows(job, SQUARE, set()):
        row = run_stage(FilterStage(SQUARE), run_stage(decoder, read))
        if not is_closing(row):
            rows[row["key"]] = {**row, "caption": read["caption"]}
    return rows


@pytest.mark.parametrize("name", SHARDS)
def test_every_sample_of_an_odd_shard_has_its_right_outcome(
    odd_inputs: Path, decoder: DecodeStage, name: str
) -> None:
    rows = rows_of_shard(decoder, odd_inputs / "shards" / name)
    assert {key: row["reason"] or "" for key, row in rows.items()} == SHARDS[name]
    assert all(row["reason"] or split_windows(row)[0]["frames"] for row in rows.values())
    if name == "several_mp4.tar":
        assert {row["caption"] for row in rows.values()} == {"stereo pair"}
    if name == "captions.tar":
        said = {key: rows[key]["caption"] for key in ("listcap", "jsonlist", "utf16", "white")}
        assert said == {"listcap": "A car.", "jsonlist": "A car.", "utf16": "ü", "white": ""}


def test_no_odd_shard_is_forgotten(odd_inputs: Path) -> None:
    assert {path.name for path in (odd_inputs / "shards").iterdir()} == set(SHARDS)


IMAGE_COLOURS = ("cmyk_jpg", "rgb16_png", "rgba_png", "animated_webp", "animated_png",
                 "palette_trans_png", "UP_jpg", "jpg_named_png")  # fmt: skip


def test_odd_images_come_out_in_their_colours(odd_inputs: Path, decoder: DecodeStage) -> None:
    rows = rows_of_shard(decoder, odd_inputs / "shards" / "images.tar")
    pictures = {key: frames_of(row)[0] for key, row in rows.items() if not row["reason"]}
    for key in IMAGE_COLOURS:
        off = np.abs(odd.colours_in(pictures[key]) - np.array(odd.COLOURS)).max()
        assert off <= 6, key
    # A quarter turn to the right takes bottom left to top left.
    turned = np.array(odd.COLOURS)[[2, 0, 3, 1]]
    assert np.abs(odd.colours_in(pictures["exif6_jpg"]) - turned).max() <= 6
    levels = [pictures[key].astype(int) for key in ("gray8_png", "gray16_png")]
    assert np.abs(levels[0] - levels[1]).max() <= 1
    assert np.ptp(levels[0]) > 200
