"""A folder of loose files is a shard, and gives nothing that lies outside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from data_prep.sources.find import content_sha256, fingerprint
from data_prep.sources.samples import ShardSummary, read_shard


def loose(root: Path) -> Path:
    """A folder as video2dataset's `files` output leaves it, with what may stray into it."""
    root.mkdir(parents=True)
    for n in range(3):
        (root / f"0000{n}.mp4").write_bytes(b"%d" % n * 400)
        (root / f"0000{n}.txt").write_text(f"about {n}")
        (root / f"0000{n}.json").write_text(json.dumps({"matching_score": f"0.{n}"}))
    (root / "00003.json").write_text(json.dumps({"status": "failed_to_download"}))
    (root / ".00001.mp4.part").write_bytes(b"half")
    return root


def test_a_folder_of_loose_files_is_a_shard(tmp_path: Path) -> None:
    root = loose(tmp_path / "00000")
    summary = ShardSummary()
    samples = list(read_shard(str(root), summary=summary))
    assert [(s.key, s.number, s.problem) for s in samples] == [
        ("00000", 0, ""), ("00001", 1, ""), ("00002", 2, ""), ("00003", 3, "failed_to_download"),
    ]  # fmt: skip
    assert [s.caption for s in samples] == ["about 0", "about 1", "about 2", ""]
    assert samples[2].metadata == {"matching_score": 0.2}
    assert summary.ignored_members == 1
    assert summary.sha256 == content_sha256(str(root))
    before = fingerprint(str(root))
    assert fingerprint(str(root)) == before
    (root / "00001.txt").write_text("ABOUT 1")
    assert fingerprint(str(root)) != before
    assert content_sha256(str(root)) != summary.sha256


def test_a_folder_gives_nothing_that_lies_outside_it(tmp_path: Path) -> None:
    root = loose(tmp_path / "in")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "around").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "pipe.mp4")
    summary = ShardSummary()
    assert [s.key for s in read_shard(str(root), summary=summary)][-1] == "00003"
    assert summary.ignored_members == 4


def test_plain_folders_may_be_deep_and_names_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "a" / "b.c").mkdir(parents=True)
    (tmp_path / "a" / "b.c" / "my film.v2.MP4").write_bytes(b"1")
    (tmp_path / "a" / "b.c" / "my film.v2.txt").write_text("mine")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).write_bytes(b"2")
    first, second = read_shard(str(tmp_path))
    assert (first.key, first.caption) == ("a/b.c/my film.v2", "mine")
    assert (second.key, second.media) == ("ÿ", b"2")
