"""Every sample that goes in leaves one status row, whatever is wrong with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.config import BucketConfig, CapConfig, FilterConfig, PrepareConfig
from data_prep.latents import LatentDataset
from data_prep.shards import write_shard
from data_prep.stages import CaptionStage, DecodeStage, run_stage
from media.errors import DecodeTimeout
from media.write import encode_mp4, encode_png

from .local import prepare_locally

FRAMES = np.random.default_rng(0).integers(0, 255, (20, 32, 64, 3), dtype=np.uint8)


def bad_samples() -> list[dict[str, Any]]:
    video = encode_mp4(FRAMES, 16)
    shots, unreadable = "[['0','1'],['1','2']]", {"matching_score": "(("}
    return [
        {"__key__": "good", "mp4": video, "txt": "good"},
        {"__key__": "empty", "mp4": b"", "txt": "x"},
        {"__key__": "noise", "mp4": b"\7" * 3000, "txt": "x"},
        {"__key__": "cut", "mp4": video[: len(video) // 2], "txt": "x"},
        {"__key__": "short", "mp4": encode_mp4(FRAMES[:3], 16), "txt": "x"},
        {"__key__": "text", "txt": "nothing to see"},
        {"__key__": "gone", "txt": "['a', 'b']", "json": {"status": "failed_to_download"}},
        {"__key__": "dull", "mp4": video, "json": {"matching_score": "[0.1]"}},
        {"__key__": "jumpy", "mp4": video, "json": {"shot_boundary_detection": shots}},
        {"__key__": "image", "png": encode_png(FRAMES[0]), "txt": "an image"},
        {"__key__": "broken", "jpg": b"\xff\xd8\xff" * 9, "txt": "x"},
        {"__key__": "odd", "mp4": encode_mp4(FRAMES[:, :, :50], 16), "json": unreadable},
        {"__key__": "große_ключ", "mp4": video, "txt": "unicode"},
    ]  # fmt: skip


EXPECTED = {
    "good": "", "empty": "empty_video", "noise": "unreadable_video", "cut": "unreadable_video",
    "short": "too_short", "text": "no_media", "gone": "failed_to_download",
    "dull": "low_matching_score", "jumpy": "several_shots", "image": "",
    "broken": "unreadable_image", "odd": "", "große_ключ": "",
}  # fmt: skip


def statuses(out: Path, shard: str) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(out / "status" / f"{shard}.parquet").to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def test_every_bad_sample_gets_its_reason_and_the_good_ones_their_latents(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    write_shard(tmp_path / "0.tar", bad_samples())
    report = prepare_locally(config, [str(tmp_path / "0.tar")], tmp_path / "out", codec_dir)
    found = statuses(tmp_path / "out", "0")
    assert {key: row["reason"] for key, row in found.items()} == EXPECTED
    assert report.total == len(EXPECTED)
    assert sum(count for _, _, count in report.rows()) == len(EXPECTED)
    assert report.counts == {"dropped": 2, "failed": 7, "kept": 4}
    dataset = LatentDataset(tmp_path / "out", "all")
    kept = {i.split("/")[1] for ids in dataset.buckets.values() for i in ids}
    assert kept == {key for key, reason in EXPECTED.items() if not reason}
    assert all(row["detail"] for row in found.values() if row["status"] == "failed")


def test_an_unforeseen_error_costs_one_sample(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    process = CaptionStage.process

    def fail_once(self: CaptionStage, row: dict[str, Any]) -> dict[str, Any]:
        if row["number"] == 2:
            raise ZeroDivisionError("unforeseen <object at 0x7f12ab>")
        return process(self, row)

    monkeypatch.setattr(CaptionStage, "process", fail_once)
    report = prepare_locally(config, world[:1], tmp_path, codec_dir)
    assert report.reasons == {"internal_error": 1}
    assert report.counts == {"failed": 1, "kept": 3}
    (detail,) = [r["detail"] for r in statuses(tmp_path, "00000").values() if r["detail"]]
    assert detail == "ZeroDivisionError: unforeseen <object at>"


def test_a_time_out_is_tried_once_more_with_a_longer_deadline(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DecodeStage(config.model_copy(update={"deadline_s": 2.0}))
    deadlines = []

    def read(data: bytes, **options: Any) -> None:
        deadlines.append(options["deadline_s"])
        raise DecodeTimeout("slow")

    monkeypatch.setattr(stage.reader, "read", read)
    row = {"status": "", "number": 0, "shard": "s", "key": "k", "suffix": "mp4", "media": b"1",
           "metadata": "{}"}  # fmt: skip
    assert run_stage(stage, row)["reason"] == "decode_timeout"
    assert deadlines == [2.0, 6.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"filters": FilterConfig(min_area_pixels=32 * 64 + 1)}, "small_area"),
        ({"filters": FilterConfig(min_duration_s=3.0)}, "short_duration"),
        ({"filters": FilterConfig(missing_metadata="drop")}, "missing_metadata"),
        ({"caps": CapConfig(max_pixels=100)}, "video_too_large"),
        ({"caps": CapConfig(max_media_bytes=100)}, "video_too_large"),
        ({"bucket": BucketConfig(num_frames=81, height=32, width=32)}, "too_short"),
    ],
)
def test_settings_decide_and_are_named(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "mp4": encode_mp4(FRAMES, 16)}])
    changed = config.model_copy(update=change)
    report = prepare_locally(changed, [str(tmp_path / "0.tar")], tmp_path / "out", codec_dir)
    assert report.reasons == {reason: 1}


def test_runs_without_images_drop_them_by_name(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    without = config.model_copy(update={"images": False})
    report = prepare_locally(without, world, tmp_path, codec_dir)
    assert report.reasons == {"image": 3}


def test_empty_cut_and_unreadable_shards_are_in_the_report(
    config: PrepareConfig, world: list[str], codec_dir: Path, tmp_path: Path
) -> None:
    shards = {name: tmp_path / f"{name}.tar" for name in ("junk", "nothing", "cut", "none")}
    shards["junk"].write_bytes(b"junk" * 1000)
    shards["nothing"].write_bytes(b"")
    shards["cut"].write_bytes(Path(world[0]).read_bytes()[:9000])
    write_shard(shards["none"], [])
    report = prepare_locally(
        config, [str(path) for path in shards.values()], tmp_path / "out", codec_dir
    )
    assert set(report.unreadable_shards) == {"junk", "nothing"}
    assert report.truncated_shards == ("cut",)
    assert report.reasons == {"truncated_shard": 1}
    assert report.shards == 4


def test_the_odd_files_of_real_crawls(
    config: PrepareConfig, odd_videos: Path, codec_dir: Path, tmp_path: Path
) -> None:
    samples = [
        {"__key__": path.stem, path.suffix[1:]: path.read_bytes(), "txt": path.stem}
        for path in sorted(odd_videos.iterdir())
    ]
    write_shard(tmp_path / "0.tar", samples)
    longer = config.model_copy(update={"bucket": BucketConfig(num_frames=17, height=32, width=32)})
    report = prepare_locally(longer, [str(tmp_path / "0.tar")], tmp_path / "out", codec_dir)
    reasons = {key: row["reason"] for key, row in statuses(tmp_path / "out", "0").items()}
    assert reasons == {
        "av1": "",
        "corrupted": "unreadable_video",
        "empty": "empty_video",
        "h265": "too_short",
        "rotated_90": "too_short",
        "truncated": "unreadable_video",
    }
    assert Counter(report.reasons).total() == 5
