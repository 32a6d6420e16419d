"""Shards in any state: what precedes a cut is kept, what is hostile ignored, all is numbered."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.shards import (
    ShardError,
    ShardSummary,
    parse_metadata,
    plain_caption,
    read_literal,
    read_shard,
    write_shard,
)


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def sample(key: str, **members: Any) -> dict[str, Any]:
    return {"__key__": key, "txt": f"about {key}", "mp4": key.encode() * 400, **members}


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_shard(path, [sample("b", json={"matching_score": "[0.5]"}), sample("a")])
    summary = ShardSummary()
    first, second = read_shard(str(path), summary=summary)
    assert (first.key, first.number, first.suffix) == ("b", 0, "mp4")
    assert first.media == b"b" * 400
    assert first.caption == "about b"
    assert first.metadata == {"matching_score": [0.5]}
    assert (second.key, second.number, second.problem) == ("a", 1, "")
    assert summary.num_samples == 2
    assert not summary.truncated
    assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_samples_give_the_same_tar(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_shard(tmp_path / name, [sample("a", json={"k": 1})])
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize("key", ["a.b", "../a", "", "/a"])
def test_keys_that_would_not_come_back_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ShardError, match="key"):
        write_shard(tmp_path / "0.tar", [sample(key)])
    assert list(tmp_path.iterdir()) == []


def test_every_cut_keeps_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_shard(path, [sample(f"k{n}") for n in range(4)])
    data = path.read_bytes()
    keys = [f"k{n}" for n in range(4)]
    cut_path = tmp_path / "cut.tar"
    for cut in range(600, len(data) - 8192, 700):
        cut_path.write_bytes(data[:cut])
        summary = ShardSummary()
        found = list(read_shard(str(cut_path), summary=summary))
        assert [s.key for s in found] == keys[: len(found)]
        assert summary.num_samples == len(found)
        assert all(not s.problem for s in found[:-1])
        assert all(s.media for s in found[:-1])
        assert summary.truncated or summary.error or cut % 512 == 0
        if found and found[-1].problem:
            assert found[-1].problem == "truncated_shard"
            assert summary.truncated


def test_a_damaged_header_ends_the_shard_there_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    source = tar_of(path, [(f"k{n}.mp4", b"1" * 512) for n in range(3)])
    data = bytearray(path.read_bytes())
    data[2 * 1024 : 2 * 1024 + 512] = b"\7" * 512
    path.write_bytes(data)
    summary = ShardSummary()
    assert [s.problem for s in read_shard(source, summary=summary)] == ["", "truncated_shard"]
    assert summary.truncated


def test_a_tar_without_its_end_mark_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    end = tar_of(path, [("a.mp4", b"1" * 512), ("a.txt", b"x" * 512)])
    path.write_bytes(Path(end).read_bytes()[: 4 * 512])
    summary = ShardSummary()
    (only,) = read_shard(str(path), summary=summary)
    assert (only.problem, only.caption, summary.truncated) == ("", "x" * 512, False)


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100])
def test_no_tar_at_all_is_an_error_of_the_shard_not_a_crash(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    summary = ShardSummary()
    assert list(read_shard(str(path), summary=summary)) == []
    assert "not a readable tar" in summary.error


def test_a_missing_shard_says_so(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cannot open shard"):
        list(read_shard(str(tmp_path / "none.tar")))


def test_links_devices_and_climbing_names_are_ignored(tmp_path: Path) -> None:
    link = tarfile.TarInfo("l.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    pipe = tarfile.TarInfo("p.mp4")
    pipe.type = tarfile.FIFOTYPE
    source = tar_of(
        tmp_path / "0.tar",
        [("../up.mp4", b"1"), ("/abs.mp4", b"1"), (link, b""), (pipe, b""), ("ok.mp4", b"1")],
    )
    summary = ShardSummary()
    assert [s.key for s in read_shard(source, summary=summary)] == ["ok"]
    assert summary.ignored_members == 4


def test_media_over_the_cap_is_skipped_with_a_problem(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "0.tar", [("a.mp4", b"1" * 5000), ("b.mp4", b"1")])
    big, small = read_shard(source, max_media_bytes=1000)
    assert (big.problem, big.media) == ("video_too_large", b"")
    assert small.problem == ""


def test_a_failed_download_keeps_its_status_and_first_caption(tmp_path: Path) -> None:
    record = {"status": "failed_to_download", "error_message": "gone", "clips": "[]"}
    source = tar_of(
        tmp_path / "0.tar",
        [("a.json", json.dumps(record).encode()), ("a.txt", b"['A car.', 'A road.']")],
    )
    (found,) = read_shard(source)
    assert (found.problem, found.detail) == ("failed_to_download", "gone")
    assert found.caption == "A car."


def test_a_second_sample_of_the_same_key_is_marked(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "0.tar", [("a.mp4", b"1"), ("b.mp4", b"1"), ("a.mp4", b"2")])
    assert [s.problem for s in read_shard(source)] == ["", "", "duplicate_key"]


def test_the_key_ends_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "0.tar", [("x.y/a.b.mp4", b"1"), ("./c.mp4", b"1")])
    assert [(s.key, s.problem) for s in read_shard(source)] == [("x.y/a", "no_media"), ("c", "")]


@pytest.mark.parametrize(
    "data", [b"{", b"[1]", b"\xff\xfe", b'{"a":' * 5000, b'"text"', b"[" * 100_000]
)
def test_metadata_that_is_no_object_is_no_metadata(data: bytes) -> None:
    assert parse_metadata(data) == {}


def test_literals_are_values_and_code_stays_text() -> None:
    assert read_literal("[[1, 2.5], None]") == [[1, 2.5], None]
    for text in ("__import__('os').system('true')", "(" * 100_000, "1+", "[" * 5000):
        assert read_literal(text) == text


def test_captions_are_made_printable() -> None:
    assert plain_caption(" a \udcff b ") == "a ? b"
    assert plain_caption("[not a list") == "[not a list"


def test_gzipped_shards_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"png"))
    (found,) = read_shard(str(path))
    assert (found.key, found.is_image) == ("a", True)


def test_the_real_shards_hold_what_their_readme_says(panda_samples: Path) -> None:
    problems: Counter[str] = Counter()
    for path in sorted(panda_samples.glob("*.tar")):
        problems.update(s.problem for s in read_shard(str(path)))
    assert problems == {"": 48, "failed_to_download": 6}
