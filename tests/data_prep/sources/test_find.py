"""Which shards a user means."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.config import PrepareConfig
from data_prep.run import plan_run
from data_prep.sources.find import find_shards, name_shards
from data_prep.sources.listing import ShardError
from tests.data_prep.bad_media import moving, video
from tests.data_prep.in_process import prepare_locally


def test_a_folder_means_its_tars_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "notes.txt"):
        (tmp_path / name).touch()
    assert find_shards(str(tmp_path)) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]


def test_a_range_keeps_its_zeros() -> None:
    assert find_shards("s3://b/{098..101}.tar")[1:3] == ["s3://b/099.tar", "s3://b/100.tar"]


def test_a_list_file_may_hold_ranges_and_comments(tmp_path: Path) -> None:
    listing = tmp_path / "shards.txt"
    listing.write_text("# mine\ns3://b/{0..1}.tar\n\n")
    assert find_shards(str(listing)) == ["s3://b/0.tar", "s3://b/1.tar"]


@pytest.mark.parametrize("source", ["nowhere", "{9..3}.tar", "{0..99999999}.tar"])
def test_what_names_nothing_is_refused(source: str) -> None:
    with pytest.raises(ShardError):
        find_shards(source)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no samples in"):
        find_shards(str(tmp_path))


def test_a_downloaders_folders_are_a_shard_each(tmp_path: Path) -> None:
    for name, file in (("00001", "a.mp4"), ("00000", "b.json"), ("_tmp", "c.mp4"), ("empty", "d")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    (tmp_path / "00000_stats.json").touch()
    (tmp_path / "00000.parquet").touch()
    assert find_shards(str(tmp_path)) == [str(tmp_path / "00000"), str(tmp_path / "00001")]


def test_a_folder_of_videos_is_one_shard(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a.mp4", "a.txt", "more/b.mp4"):
        (tmp_path / name).touch()
    assert find_shards(str(tmp_path)) == [str(tmp_path)]


def test_tars_beside_loose_media_are_refused(tmp_path: Path) -> None:
    for name in ("a.tar", "b.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(ShardError, match="both tars and loose media"):
        find_shards(str(tmp_path))


def test_lists_name_places_beside_them_and_never_lists(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "x.png").touch()
    listing = tmp_path / "list.txt"
    listing.write_text(f"\ufeffa.tar\nloose\n{tmp_path}/a.tar\n")
    assert find_shards(str(listing)) == [
        str(tmp_path / "a.tar"), str(tmp_path / "loose"), str(tmp_path / "a.tar")
    ]  # fmt: skip
    for text in ("list.txt\n", "# nothing\n"):
        listing.write_text(text)
        with pytest.raises(ShardError, match=r"another list|names no shard"):
            find_shards(str(listing))


def test_ranges_may_name_folders_and_stand_beside_each_other() -> None:
    assert find_shards("a{0..1}/{08..09}.tar") == [
        "a0/08.tar", "a0/09.tar", "a1/08.tar", "a1/09.tar"
    ]  # fmt: skip


def test_folders_are_named_like_tars() -> None:
    assert name_shards(["/d/00000", "/d/00001.tar"]) == {
        "00000": "/d/00000",
        "00001": "/d/00001.tar",
    }


def test_loose_files_give_what_a_tar_of_them_gives(
    config: PrepareConfig, codec_dir: Path, tmp_path: Path
) -> None:
    """A downloader's folder, a tar of it in any order, and a list that names both layouts."""
    image = Image.fromarray(moving(1)[0])
    loose = tmp_path / "loose" / "00000"
    loose.mkdir(parents=True)
    for number in range(3):
        (loose / f"clip.{number}.mp4").write_bytes(video(moving(20 + number)))
        (loose / f"clip.{number}.txt").write_text(f"clip {number}")
    for suffix in ("jpg", "jpeg", "png", "webp"):
        image.save(loose / f"image-{suffix}.{suffix}")
        (loose / f"image-{suffix}.json").write_text(json.dumps({"caption": f"an image, {suffix}"}))
    (loose / "gone.json").write_text(json.dumps({"status": "failed_to_download"}))
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for path in sorted(loose.iterdir(), key=lambda path: path.name[::-1]):
            tar.add(path, path.name)
    (tmp_path / "list.txt").write_text("00000.tar\nloose/00000\n")
    outputs = []
    for name, source in (("a", tmp_path / "loose"), ("b", tmp_path / "00000.tar")):
        shards = find_shards(str(source))
        report = prepare_locally(config, shards, tmp_path / name, codec_dir)
        assert report.counts == {"failed": 1, "kept": 7}
        files = sorted((tmp_path / name).glob("*/*.parquet"))
        rows = [pq.read_table(f).drop_columns(_numbers(f)).to_pylist() for f in files]
        outputs.append(rows)
        assert plan_run(config, shards, tmp_path / name, str(codec_dir)).jobs == ()
    assert outputs[0] == outputs[1]
    captions = outputs[0][0]
    assert {row["caption"] for row in captions} >= {"clip 2", "an image, webp"}
    both = find_shards(str(tmp_path / "list.txt"))
    assert prepare_locally(config, both, tmp_path / "c", codec_dir).total == 16
    (loose / "clip.1.txt").write_text("another caption")
    (job,) = plan_run(config, find_shards(str(loose)), tmp_path / "a", str(codec_dir)).jobs
    assert job.source == str(loose)


def _numbers(path: Path) -> list[str]:
    """The column that tells the order of a shard's members, where a file has it."""
    return [name for name in pq.read_schema(path).names if name == "number"]
