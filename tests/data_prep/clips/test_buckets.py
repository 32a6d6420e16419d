"""Lengths and resolutions: what one decoding cuts is what a run for each of them cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from data_prep.clips.buckets import BucketConfig
from data_prep.clips.decode import DecodeStage
from data_prep.config import FilterConfig, PrepareConfig
from data_prep.row import Row, split_windows
from data_prep.stages import run_stage
from flow.aspects import SizeError, area_of
from flow.codec_factors import WAN_FACTORS
from media.read import VideoReader
from media.write import encode_png
from tests.data_prep.bad_media import moving, video, with_bars
from tests.data_prep.in_process import decode_row

SPACE = 16
ASPECTS = ("1:1", "16:9", "9:16")
MOVING = video(moving(60))
BOXED = video(with_bars(moving(60, 48, 96), 8, 16), options={"qp": "0"})
SOURCES = {
    "video": {"media": MOVING},
    "bars": {"media": BOXED},
    "tall": {"media": video(moving(50, 96, 48))},
    "image": {"media": encode_png(moving(1)[0]), "suffix": "png"},
    "boxed image": {"media": encode_png(with_bars(moving(1), 8)[0]), "suffix": "png"},
}


@contextmanager
def decoding(config: PrepareConfig) -> Iterator[DecodeStage]:
    stage = DecodeStage(config, config.bucket.all_sizes(SPACE))
    try:
        yield stage
    finally:
        stage.close()


def windows(config: PrepareConfig, **values: Any) -> dict[int, Row]:
    """What the decoding stage makes of a sample, by the number of the window."""
    with decoding(config) as stage:
        return {
            part["window"]: part for part in split_windows(run_stage(stage, decode_row(**values)))
        }


def settings(**bucket: Any) -> PrepareConfig:
    filters = FilterConfig(crop_bars=bucket.pop("crop_bars", False))
    shape = {"num_frames": 5, "fps": 8.0, "aspects": ASPECTS, **bucket}
    return PrepareConfig(bucket=BucketConfig(**shape), filters=filters, windows_per_clip=3)


CUT = ("status", "reason", "frames", "frames_shape", "frames_digest", "pts_s", "bars", "note")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("crop_bars", [False, True], ids=["whole", "bars cut"])
def test_resolutions_of_one_decoding_are_those_of_separate_runs_byte_for_byte(
    source: str, crop_bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("48p", "24p", "36p")
    separate = [
        windows(settings(resolutions=(name,), crop_bars=crop_bars), **SOURCES[source])
        for name in names
    ]
    calls = []
    read = VideoReader.read
    monkeypatch.setattr(VideoReader, "read", lambda *a, **k: calls.append(1) or read(*a, **k))
    together = windows(settings(resolutions=names, crop_bars=crop_bars), **SOURCES[source])
    is_image = "image" in source
    # Bars are known after the last frame only: such a video is decoded twice, however many sizes.
    assert len(calls) == (0 if is_image else 2 if crop_bars and source == "bars" else 1)
    assert list(together) == list(range(3 * len(separate[0])))
    assert len(separate[0]) == (1 if is_image else 3)
    for number, row in together.items():
        alone = separate[number % 3][number // 3]
        assert {name: row[name] for name in CUT} == {name: alone[name] for name in CUT}
        assert row["status"] == ""
    shapes = {tuple(row["frames_shape"][1:3]) for row in together.values()}
    assert len(shapes) == 3


def test_a_video_has_the_windows_of_the_longest_length_that_fits() -> None:
    counts = (17, 5, 33)
    for length, longest in ((60, 17), (66, 33), (33, 17), (9, 5), (31, 5)):
        media = video(moving(length))
        several = windows(settings(frame_counts=counts, num_frames=9), media=media)
        alone = windows(settings(num_frames=longest), media=media)
        assert list(several) == list(alone)
        assert {len(row["pts_s"]) for row in several.values()} == {longest}
        for number, row in several.items():
            assert {name: row[name] for name in CUT} == {name: alone[number][name] for name in CUT}
    (row,) = windows(settings(frame_counts=counts), media=video(moving(7))).values()
    assert (row["status"], row["reason"]) == ("failed", "too_short")
    assert "0.375 s" in row["detail"]
    assert "5 frames at 8 fps, the fewest of 33, 17, 5, need one at 0.500 s" in row["detail"]


@pytest.mark.parametrize("crop_bars", [False, True])
def test_a_resolution_that_enlarges_too_much_is_left_out_and_the_others_keep_their_numbers(
    crop_bars: bool,
) -> None:
    # 48 rows and 64 columns: 1.0 times to 48x48 (1:1), 1.33 times to 64x64.
    bucket = {"resolutions": ("48p", "36p"), "aspects": ("1:1",), "crop_bars": crop_bars}
    limited = {**bucket, "max_enlargement": 1.2}
    for source in ("video", "image"):
        free = windows(settings(**bucket), **SOURCES[source])
        parts = windows(settings(**limited), **SOURCES[source])
        assert list(parts) == list(free)
        assert {part["reason"] for number, part in parts.items() if number % 2 == 0} == {
            "too_small"
        }
        assert parts[0]["detail"] == "48×64 would be enlarged 1.333 times to fill 64×64, over 1.2"
        for number, part in parts.items():
            if number % 2:
                assert {k: part[k] for k in CUT} == {k: free[number][k] for k in CUT}
        alone = settings(**{**limited, "resolutions": ("48p",)})
        (gone,) = windows(alone, **SOURCES[source]).values()
        assert (gone["status"], gone["reason"]) == ("dropped", "too_small")


def test_what_is_too_small_for_every_resolution_is_dropped_before_a_frame_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_frames(*_: object) -> None:
        raise AssertionError("frames were decoded")

    monkeypatch.setattr(VideoReader, "_frames", no_frames)
    config = settings(resolutions=("96p", "72p"), max_enlargement=1.0)
    (row,) = windows(config, media=MOVING).values()
    assert (row["status"], row["reason"]) == ("dropped", "too_small")


def test_enlargement_is_judged_inside_the_bars() -> None:
    # The picture is 48 by 96; with its bars it has 64 rows.
    for crop_bars, reason in ((False, ""), (True, "too_small")):
        config = settings(
            resolutions=("48p",), aspects=("1:1",), max_enlargement=1.0, crop_bars=crop_bars
        )
        assert (windows(config, media=BOXED)[0]["reason"] or "") == reason


def test_a_resolution_is_the_area_of_a_wide_picture_of_its_rows() -> None:
    for rows in (240, 360, 384, 480, 720, 1080, 2160):
        assert area_of(f"{rows}p") == pytest.approx(rows * rows * 16 / 9)
    bucket = BucketConfig(resolutions=("384p", "480p"), height=48, width=64)
    assert bucket.all_sizes(16) == [(448, 592), (560, 736)]
    several = BucketConfig(resolutions=("480p", "384p"), aspects=ASPECTS)
    by_resolution = several.sizes_by_resolution(16)
    assert by_resolution == [
        BucketConfig(height=side, width=side, aspects=ASPECTS).all_sizes(16) for side in (640, 512)
    ]
    assert several.all_sizes(16) == by_resolution[0] + by_resolution[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resolutions": ["480"]}, "'480' is not ROWSp, such as 480p"),
        ({"resolutions": ["0p"]}, "not ROWSp"),
        ({"resolutions": ["2305p"]}, "beyond 2304p"),
        ({"resolutions": ["480p"], "sizes": [[64, 64]]}, "resolutions and bucket.sizes are both"),
        ({"frame_counts": [17, 17]}, r"\[17, 17\] names a length twice"),
        ({"frame_counts": [17, 1]}, "holds 1; a clip has 2 to 1025 frames"),
        ({"max_enlargement": 0.5}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BucketConfig.model_validate(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"frame_counts": [81, 50]}, "frame_counts is 50; the codec takes 4k.1 frames: use 49 or"),
        ({"resolutions": ["48p", "49p"]}, "same size twice"),
        ({"resolutions": ["48p", "48p"], "aspects": ["1:1"]}, "same size twice"),
    ],
)
def test_lengths_and_resolutions_are_held_against_the_codec(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(SizeError, match=words):
        BucketConfig.model_validate(values).check(WAN_FACTORS)
    BucketConfig(frame_counts=(81, 49, 33, 17), resolutions=("384p", "480p")).check(WAN_FACTORS)
