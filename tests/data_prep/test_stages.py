"""Every sample that goes in leaves one status row, whatever is wrong with it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.captions.stage import CaptionStage
from data_prep.config import BucketConfig, CapConfig, FilterConfig, PrepareConfig
from data_prep.latents.dataset import LatentDataset
from data_prep.sources.samples import write_shard
from media.write import encode_mp4, encode_png
from tests.data_prep.in_process import prepare_locally

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
    rows = statuses(tmp_path / "out", "0")
    assert {key: row["reason"] for key, row in rows.items()} == EXPECTED
    assert report.total == len(EXPECTED)
    assert sum(count for _, _, count in report.rows()) == len(EXPECTED)
    assert report.counts == {"dropped": 2, "failed": 7, "kept": 4}
    dataset = LatentDataset(tmp_path / "out", "all")
    kept = {i.split("/")[1] for ids in dataset.buckets.values() for i in ids}
    assert kept == {key for key, reason in EXPECTED.items() if not reason}
    assert all(row["detail"] for row in rows.values() if row["status"] == "failed")


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


def noisy(count: int, height: int = 32, width: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def prepared(
    config: PrepareConfig, codec: Path, root: Path, samples: list[dict[str, Any]], **change: Any
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, int], dict[str, Any]]]:
    """Status rows by key and latent rows by (key, window)."""
    write_shard(root / "0.tar", samples)
    prepare_locally(config.model_copy(update=change), [str(root / "0.tar")], root / "out", codec)
    latents = [
        row
        for path in sorted((root / "out" / "latents").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    return statuses(root / "out", "0"), {(r["key"], r["window"]): r for r in latents}


def test_each_pixel_filter_has_its_reason_and_bars_are_cut_and_noted(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    still = np.repeat(noisy(1), 20, axis=0)
    half = np.concatenate([np.zeros((10, 32, 64, 3), np.uint8), noisy(10)])
    boxed = np.pad(noisy(20, 48, 96), ((0, 0), (12, 12), (16, 16), (0, 0)))
    narrow = np.pad(noisy(20, 16, 64), ((0, 0), (24, 24), (0, 0), (0, 0)))
    clips = {"good": noisy(20), "still": still, "black": np.zeros_like(still), "half": half,
             "white": np.full_like(still, 255), "boxed": boxed, "narrow": narrow}  # fmt: skip
    samples = [{"__key__": key, "mp4": encode_mp4(clip, 16, crf=1)} for key, clip in clips.items()]
    samples.append(
        {"__key__": "image", "png": encode_png(np.pad(noisy(1)[0], ((8, 8), (0, 0), (0, 0))))}
    )
    filters = FilterConfig(
        static_below=0.5,
        max_black_frames=0.3,
        max_white_frames=0.3,
        crop_bars=True,
        max_bar_share=0.6,
    )
    rows, latents = prepared(config, codec_dir, tmp_path, samples, filters=filters)
    assert {key: row["reason"] for key, row in rows.items()} == {
        "good": "", "still": "static_clip", "black": "black_frames", "white": "white_frames",
        "half": rows["half"]["reason"], "boxed": "", "narrow": "letterbox", "image": "",
    }  # fmt: skip
    assert rows["boxed"]["detail"] == "bars: top 12, bottom 12, left 16, right 16"
    assert latents["boxed", 0]["bars"] == [12, 12, 16, 16]
    assert latents["image", 0]["bars"] == [8, 8, 0, 0]
    assert latents["good", 0]["bars"] == [0, 0, 0, 0]
    assert rows["narrow"]["detail"] == "bars take 0.750 of the area, over 0.6"


def test_videos_go_to_the_bucket_of_the_nearest_aspect(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    sizes = {"wide": (36, 64), "tall": (64, 36), "square": (40, 40), "panorama": (32, 112)}
    samples = [{"__key__": k, "mp4": encode_mp4(noisy(20, *s), 16)} for k, s in sizes.items()]
    samples.append({"__key__": "image", "png": encode_png(noisy(1, 64, 36)[0])})
    bucket = BucketConfig(
        num_frames=5, height=32, width=32, aspects=("1:1", "16:9", "9:16", "21:9")
    )
    _, latents = prepared(config, codec_dir, tmp_path, samples, bucket=bucket)
    assert {key: row["bucket"] for (key, _), row in latents.items()} == {
        "wide": "5x32x48", "tall": "5x48x32", "square": "5x32x32", "panorama": "5x16x48",
        "image": "1x48x32",
    }  # fmt: skip
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["buckets"] == sorted(
        f"{n}x{s}" for n in (1, 5) for s in ("16x48", "32x32", "32x48", "48x32")
    )


def test_long_clips_give_several_windows_each_with_its_times(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    clips = {"long": 60, "middle": 24, "short": 12}
    samples = [{"__key__": k, "mp4": encode_mp4(noisy(n), 16)} for k, n in clips.items()]
    rows, latents = prepared(config, codec_dir, tmp_path, samples, windows_per_clip=3)
    assert {row["status"] for row in rows.values()} == {"kept"}
    assert list(latents) == [
        ("long", 0), ("long", 1), ("long", 2), ("middle", 0), ("middle", 1), ("short", 0)
    ]  # fmt: skip
    for key in clips:
        times = [t for (k, _), row in latents.items() if k == key for t in row["pts_s"]]
        assert times == sorted(set(times))
        assert all(abs(t * 16 - round(t * 16)) < 1e-3 for t in times)
    captions = pq.read_table(tmp_path / "out" / "captions" / "0.parquet").to_pylist()
    assert [(row["key"], row["window"]) for row in captions] == list(latents)
    assert len({latents["long", n]["mean"] for n in range(3)}) == 3
    dataset = LatentDataset(tmp_path / "out", "all")
    assert len(dataset) == 6
    _, single = prepared(config, codec_dir, tmp_path / "one", samples)
    assert single["short", 0] == latents["short", 0]


def test_an_output_of_several_lengths_and_resolutions_is_the_separate_outputs_together(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    shapes = {
        "long": (60, 32, 64),
        "short": (12, 32, 64),
        "tall": (30, 64, 36),
        "flash": (5, 32, 64),
    }
    samples = [{"__key__": k, "mp4": encode_mp4(noisy(*s), 16)} for k, s in shapes.items()]
    samples.append({"__key__": "image", "png": encode_png(noisy(1, 64, 36)[0])})
    shape = {"num_frames": 5, "fps": 8.0, "aspects": ("1:1", "16:9", "9:16")}
    names, counts = ("36p", "24p"), (17, 5)
    bucket = BucketConfig(**shape, resolutions=names, frame_counts=counts)
    rows, latents = prepared(
        config, codec_dir, tmp_path, samples, bucket=bucket, windows_per_clip=2
    )
    # Of the longest that fits: 1.75 s of "tall" hold no 17 frames at 8 fps, which take 2 s.
    lengths = {"long": 17, "tall": 5, "short": 5, "image": 1}
    assert {key: row["reason"] for key, row in rows.items()} == dict.fromkeys(shapes, "") | {
        "flash": "too_short", "image": "",
    }  # fmt: skip
    alone = {
        (name, count): prepared(
            config, codec_dir, tmp_path / f"{name}{count}", samples, windows_per_clip=2,
            bucket=BucketConfig(**shape | {"num_frames": count}, resolutions=(name,)),
        )[1]
        for name in names
        for count in counts
    }  # fmt: skip
    expected = {}
    for (name, count), made in alone.items():
        for (key, window), row in made.items():
            if lengths[key] in (count, 1):
                number = window * len(names) + names.index(name)
                expected[key, number] = {**row, "window": number}
    assert latents == expected
    assert len({row["bucket"] for row in latents.values()}) == 8
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert len(info["buckets"]) == 3 * len(names) * 3
    dataset = LatentDataset(tmp_path / "out", "all")
    for bucket_, ids in dataset.buckets.items():
        assert {str(dataset.get(name).bucket) for name in ids} == {str(bucket_)}
    captions = pq.read_table(tmp_path / "out" / "captions" / "0.parquet").to_pylist()
    assert {(row["key"], row["window"]) for row in captions} == set(latents)


def test_a_window_may_fall_while_its_clip_stays(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    clip = np.concatenate([noisy(12), np.zeros((12, 32, 64, 3), np.uint8)])
    rows, latents = prepared(
        config, codec_dir, tmp_path, [{"__key__": "a", "mp4": encode_mp4(clip, 16)}],
        windows_per_clip=2, filters=FilterConfig(max_black_frames=0.5),
    )  # fmt: skip
    assert list(latents) == [("a", 0)]
    assert (rows["a"]["status"], rows["a"]["detail"]) == ("kept", "windows: not 1 black_frames")


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


def test_the_real_clips_go_through(
    config: PrepareConfig, panda_samples: Path, codec_dir: Path, tmp_path: Path
) -> None:
    """With every filter on: real clips are neither still nor black, and two windows fit in most."""
    filters = FilterConfig(
        static_below=0.05, max_black_frames=0.9, max_white_frames=0.9, crop_bars=True
    )
    changed = config.model_copy(update={"filters": filters, "windows_per_clip": 2})
    report = prepare_locally(changed, [str(panda_samples / "00000.tar")], tmp_path, codec_dir)
    assert report.reasons["failed_to_download"] == 2
    assert report.counts["kept"] >= 14
    assert set(report.reasons) <= {"failed_to_download", "static_clip"}
    assert len(LatentDataset(tmp_path, "all")) > report.counts["kept"]
