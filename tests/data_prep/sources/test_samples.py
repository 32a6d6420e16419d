"""Shards in any state: what precedes a cut is kept, what is hostile ignored, all is numbered."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_prep.sources.listing import ShardError
from data_prep.sources.samples import (
    ShardSummary,
    parse_metadata,
    plain_caption,
    read_literal,
    read_shard,
    write_shard,
)
from data_prep.storage.location import StorageError


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
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


def test_a_full_disk_is_said_and_leaves_the_old_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [{"__key__": "a", "txt": "old"}])

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        StorageError, match=r"cannot write .*a\.tar: No space left.*free some space"
    ):
        write_shard(path, [{"__key__": "a", "txt": "new"}])
    assert [sample.caption for sample in read_shard(str(path))] == ["old"]
    assert os.listdir(tmp_path) == ["a.tar"]


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
        samples = list(read_shard(str(cut_path), summary=summary))
        assert [s.key for s in samples] == keys[: len(samples)]
        assert summary.num_samples == len(samples)
        assert all(not s.problem for s in samples[:-1])
        assert all(s.media for s in samples[:-1])
        assert summary.truncated or summary.error or cut % 512 == 0
        if samples and samples[-1].problem:
            assert samples[-1].problem == "truncated_shard"
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
    (only,) = read_shard(source)
    assert (only.problem, only.detail) == ("failed_to_download", "gone")
    assert only.caption == "A car."


@pytest.mark.parametrize("status", ["<b>no</b>", "a" * 41, "", None, 7.5, ["x"], "success"])
def test_only_a_downloaders_word_becomes_a_reason(tmp_path: Path, status: Any) -> None:
    source = tar_of(tmp_path / "0.tar", [("a.json", json.dumps({"status": status}).encode())])
    (only,) = read_shard(source)
    assert only.problem == "no_media"


def test_a_second_sample_of_the_same_key_is_marked(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "0.tar", [("a.mp4", b"1"), ("b.mp4", b"1"), ("a.mp4", b"2")])
    assert [s.problem for s in read_shard(source)] == ["", "", "duplicate_key"]


def test_keys_may_hold_dots(tmp_path: Path) -> None:
    names = ["x.y/a.b.mp4", "x.y/a.b.txt", "./c.mp4", "./c.JSON", "v1.2.json", "v1.2.txt"]
    source = tar_of(tmp_path / "0.tar", [(name, b"1") for name in names])
    samples = [(s.key, s.problem, s.caption) for s in read_shard(source)]
    assert samples == [("x.y/a.b", "", "1"), ("c", "", ""), ("v1.2", "no_media", "1")]


def test_what_hangs_on_a_key_is_no_sample_of_its_own(tmp_path: Path) -> None:
    names = [
        "a.frames.npy",
        "a.mp4",
        "a.mp4.md5",
        "a.old.txt",
        "a.txt",
        "b.left.mp4",
        "b.right.mp4",
        "c.flo",
    ]
    source = tar_of(tmp_path / "0.tar", [(name, name.encode()) for name in names])
    samples = [(s.key, s.caption, s.problem) for s in read_shard(source)]
    assert samples == [
        ("a", "a.txt", ""), ("b.left", "", ""), ("b.right", "", ""), ("c", "", "no_media"),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_members_of_a_sample_may_lie_anywhere(tmp_path: Path, suffix: str) -> None:
    """As `tar` leaves them where a file system lists a folder in the order of its hashes."""
    samples = [sample(f"k.{n}", json={"matching_score": f"[0.{n}]"}) for n in range(6)]
    write = [(f"{s['__key__']}.{m}", s[m]) for s in samples for m in ("mp4", "txt", "json")]
    data = [(n, d if isinstance(d, bytes) else str(d).encode()) for n, d in write]
    data = [(n, d.replace(b"'", b'"') if n.endswith("json") else d) for n, d in data]
    for seed in range(5):
        random.Random(seed).shuffle(data)
        path = tmp_path / f"{seed}.{suffix}"
        tar_of(path, data, "w:gz" if suffix.endswith("gz") else "w")
        summary = ShardSummary()
        samples = list(read_shard(str(path), summary=summary))
        first = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in data))
        assert [s.key for s in samples] == first
        assert all(s.media == s.key.encode() * 400 for s in samples)
        assert all(s.caption == f"about {s.key}" for s in samples)
        assert all(s.metadata["matching_score"] == [float(f"0.{s.key[2:]}")] for s in samples)
        assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        ("Café".encode(), "Café"),
        ("Café".encode("cp1252"), "Café"),
        ("\ufeffCafé".encode(), "Café"),
        ("Ein Hügel".encode("utf-16"), "Ein Hügel"),
        (b"\x81\xfe\xff", "\ufffdþÿ"),
    ],
)
def test_captions_of_any_encoding_become_text(tmp_path: Path, data: bytes, caption: str) -> None:
    source = tar_of(tmp_path / "0.tar", [("a.mp4", b"1"), ("a.txt", data)])
    (only,) = read_shard(source)
    assert (only.caption, only.problem) == (caption, "")
    assert only.caption.encode().decode() == caption


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_huge_texts_are_not_read_and_the_sample_says_so(tmp_path: Path, suffix: str) -> None:
    huge = b'{"caption": "' + b"a" * 2_000_000 + b'"}'
    source = tar_of(tmp_path / "0.tar", [("a.mp4", b"1"), (f"a.{suffix}", huge)])
    (only,) = read_shard(source)
    assert (only.problem, only.caption, only.metadata) == ("", "", {})
    assert only.note == f"{suffix}: {len(huge)} bytes not read, over 1048576"


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "head",
    [
        header("b.mp4", -1024),
        header("b.mp4", 2**62),
        header("L", 2**40, tarfile.GNUTYPE_LONGNAME),
        header("x", 2**40, tarfile.XHDTYPE),
        header("s.mp4", 512, tarfile.GNUTYPE_SPARSE),
        header("x", 512, tarfile.XHDTYPE)
        + b"18 size=-99999999\n".ljust(512, b"\0")
        + header("b", 0),
    ],
)  # fmt: skip
def test_lying_headers_end_the_shard_at_once(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "0.tar"
    whole = header("a.mp4", 512) + b"1" * 512
    path.write_bytes(whole + head + b"2" * 1024)
    summary = ShardSummary()
    samples = list(read_shard(str(path), summary=summary))
    assert samples[0].key == "a"
    assert [s.problem for s in samples][-1] == "truncated_shard"
    assert summary.truncated


@pytest.mark.timeout(60)
def test_a_compressed_shard_that_grows_without_end_is_left(tmp_path: Path) -> None:
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(header("a.mp4", 512) + b"1" * 512)
        file.write(header("bomb.mp4", 2**30))
        for _ in range(256):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 2**20
    summary = ShardSummary()
    good, bomb = read_shard(str(path), summary=summary)
    assert (good.problem, good.media) == ("", b"1" * 512)
    assert (bomb.key, bomb.problem) == ("bomb", "truncated_shard")
    assert summary.error.startswith("decompression bomb")
    assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_shard_behind_a_uri_is_read_like_a_file(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "0.tar", [("a.txt", b"A"), ("b.mp4", b"2"), ("a.mp4", b"1")])
    here, there = ShardSummary(), ShardSummary()
    samples = list(read_shard(source, summary=here))
    assert samples == list(read_shard(f"file://{source}", summary=there))
    assert here == there
    assert [s.caption for s in samples] == ["A", ""]


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
    assert plain_caption(" a \udcff b ") == "a ÿ b"
    assert plain_caption("[not a list") == "[not a list"


def test_gzipped_shards_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"png"))
    (only,) = read_shard(str(path))
    assert (only.key, only.is_image) == ("a", True)


def test_the_real_shards_hold_what_their_readme_says(panda_samples: Path) -> None:
    problems: Counter[str] = Counter()
    for path in sorted(panda_samples.glob("*.tar")):
        problems.update(s.problem for s in read_shard(str(path)))
    assert problems == {"": 48, "failed_to_download": 6}


def several(name: str, members: dict[str, bytes], root: Path) -> Path:
    tar_of(root / name, list(members.items()))
    return root / name


@pytest.mark.parametrize("compression", ["", "gz", "xz", "bz2", "zstd"])
@pytest.mark.parametrize("count", [1, 2])
def test_archives_of_any_compression_and_one_after_the_other_are_read_whole(
    tmp_path: Path, compression: str, count: int
) -> None:
    parts = [several(f"{n}.tar", {f"k{n}.mp4": bytes([n]) * 3000}, tmp_path) for n in range(count)]
    packed = b"".join(pack(part.read_bytes(), compression) for part in parts)
    # The name does not say what it is.
    shard = tmp_path / "shard.tar"
    shard.write_bytes(packed)
    summary = ShardSummary()
    samples = list(read_shard(str(shard), summary=summary))
    assert [(s.key, s.media) for s in samples] == [
        (f"k{n}", bytes([n]) * 3000) for n in range(count)
    ]
    assert not summary.truncated
    assert summary.sha256 == hashlib.sha256(packed).hexdigest()


def pack(data: bytes, compression: str) -> bytes:
    if compression == "zstd":
        return pa.Codec("zstd").compress(data, asbytes=True)
    packers = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "": bytes}
    return packers[compression](data)


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2", "zstd"])
def test_a_compressed_archive_that_is_cut_gives_what_is_before_the_cut(
    tmp_path: Path, compression: str
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, 400_000, dtype=np.uint8).tobytes() for _ in range(3)]
    whole = several("a.tar", {f"{n}.mp4": noise[n] for n in range(3)}, tmp_path).read_bytes()
    packed = pack(whole, compression)
    shard = tmp_path / "cut.tar"
    shard.write_bytes(packed[: len(packed) * 3 // 4])
    summary = ShardSummary()
    samples = list(read_shard(str(shard), summary=summary))
    assert summary.truncated
    # bzip2 and xz hand out whole blocks, so that the cut may reach a little further back.
    whole_samples = [s.key for s in samples if not s.problem]
    assert whole_samples in (["0"], ["0", "1"], [])
    assert all(s.media == noise[int(s.key)] for s in samples if not s.problem)


def test_bytes_after_an_archive_that_are_none_are_left_alone(tmp_path: Path) -> None:
    shard = several("a.tar", {"a.mp4": b"1"}, tmp_path)
    shard.write_bytes(shard.read_bytes() + b"a signature of some tool" * 50)
    summary = ShardSummary()
    assert [s.key for s in read_shard(str(shard), summary=summary)] == ["a"]
    assert not summary.truncated


def test_a_downloaders_leftover_is_no_second_video(tmp_path: Path) -> None:
    names = {"a.f230.mp4": b"part", "a.mp4": b"whole", "a.txt": b"words", "b.f137.mp4": b"alone"}
    summary = ShardSummary()
    samples = list(read_shard(str(several("a.tar", names, tmp_path)), summary=summary))
    assert [(s.key, s.media, s.caption) for s in samples] == [
        ("a", b"whole", "words"),
        ("b.f137", b"alone", ""),
    ]
    assert summary.ignored_members == 1


def test_several_videos_of_a_key_share_its_caption(tmp_path: Path) -> None:
    names = {"k.txt": b"words", "k.left.mp4": b"1", "k.right.mp4": b"2", "k.right.txt": b"own"}
    samples = list(read_shard(str(several("a.tar", names, tmp_path))))
    assert [(s.key, s.caption) for s in samples] == [("k.left", "words"), ("k.right", "own")]


def test_names_that_are_no_utf8_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("caf\xe9.mp4", "caf\xe8.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    samples = list(read_shard(str(path)))
    assert [(s.key, s.problem) for s in samples] == [("caf\xe9", ""), ("caf\xe8", "")]
