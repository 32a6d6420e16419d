"""`docs/bad_input.md` is true: every kind in its table is made, run, and ends as the table says."""

from __future__ import annotations

import ast
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.config import CapConfig, PrepareConfig
from data_prep.sources.samples import write_shard
from media.pixels import PQ
from tests.data_prep.bad_media import (
    audio_only,
    av1,
    claiming_frames,
    flat,
    gif,
    moving,
    png_bomb,
    rotated,
    sample,
    video,
    without_duration,
)
from tests.data_prep.in_process import prepare_locally
from tests.data_prep.sources.test_samples import header, tar_of
from tests.media import odd_videos as odd
from tests.places import ROOT


class Row(NamedTuple):
    """A line of the table."""

    kind: str
    status: str
    reason: str
    tests: tuple[str, ...]


def table() -> dict[str, Row]:
    rows = {}
    page = (ROOT / "docs" / "bad_input.md").read_text()
    for line in page.split("## Why was my clip dropped?")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or len(cells) == 2 or cells[0] in ("kind", "---"):
            continue
        kind, _, _, status, reason, tests = cells
        rows[kind] = Row(kind, status, reason, tuple(tests.split()))
    return rows


TABLE = table()


def damaged(data: bytes, *, whole: bool) -> bytes:
    """Noise in the place of the stream, or in a few bytes of it."""
    begin = data.index(b"mdat") + 4
    noise = np.random.default_rng(0).integers(0, 255, len(data), dtype=np.uint8).tobytes()
    if whole:
        return (
            data[:begin]
            + noise[: data.index(b"moov") - 4 - begin]
            + data[data.index(b"moov") - 4 :]
        )
    place = begin + (data.index(b"moov") - begin) // 2
    return data[:place] + noise[:8] + data[place + 8 :]


def grey_16() -> bytes:
    """A PNG of sixteen-bit grey."""
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64), 30000, dtype=np.uint16)).save(file, "PNG")
    return file.getvalue()


def still(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    """An image of one of Pillow's formats and modes."""
    file = io.BytesIO()
    Image.fromarray(moving(1)[0]).resize(size).convert(mode).save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    """A JPEG that is to be turned a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return still("JPEG", exif=exif)


def moving_webp() -> bytes:
    file = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in moving(5)]
    first.save(file, "WEBP", save_all=True, append_images=rest)
    return file.getvalue()


X265 = {"x265-params": "log-level=none"}
GOOD = video(moving(20))

MEDIA: dict[str, Callable[[], dict[str, Any]]] = {
    "corrupt": lambda: {"mp4": damaged(GOOD, whole=True)},
    "concealed": lambda: {"mp4": damaged(video(moving(60, 96, 128)), whole=False)},
    "empty": lambda: {"mp4": b""},
    "truncated": lambda: {"mp4": GOOD[: len(GOOD) // 2]},
    "no_video": lambda: {"mp4": b"\7" * 3000},
    "lying_frame_count": lambda: {"mp4": claiming_frames(5000)},
    "lying_huge_count": lambda: {"mp4": claiming_frames(2**31 - 1)},
    "lying_low_count": lambda: {"mp4": claiming_frames(3)},
    "zero_length": lambda: {"mp4": without_duration()},
    "one_frame": lambda: {"mp4": video(moving(1))},
    "short": lambda: {"mp4": video(moving(5))},
    "too_small": lambda: {"mp4": video(moving(20, 16, 16))},
    "8k": lambda: {"mp4": flat(4320, 7680, 5)},
    "over_8k": lambda: {"mp4": flat(5760, 10240, 1)},
    "too_many_bytes": lambda: {"mp4": bytes(CAP_BYTES + 1)},
    "variable_rate": lambda: {"mp4": video(moving(20), ticks=[n * 40 + n * n for n in range(20)])},
    "rotated": lambda: {"mp4": rotated()},
    "10_bit": lambda: {"mp4": video(moving(20), pix_fmt="yuv420p10le")},
    "hevc": lambda: {"mp4": video(moving(20), codec="libx265", options=X265)},
    "av1": lambda: {"mp4": av1()},
    "audio_only": lambda: {"mp4": audio_only()},
    "gif_named_mp4": lambda: {"mp4": gif()},
    "huge_json": lambda: {"mp4": GOOD, "json": {"caption": "a" * 2_000_000}},
    "nested_json": lambda: {"mp4": GOOD, "json": b"[" * 100_000},
    "code_in_json": lambda: {"mp4": GOOD, "json": {"matching_score": "open('/tmp/x', 'w')"}},
    "caption_bytes": lambda: {"mp4": GOOD, "txt": "Café".encode("cp1252")},
    "no_media": dict,
    "failed_download": lambda: {"json": {"status": "failed_to_download"}},
    "broken_image": lambda: {"jpg": b"\xff\xd8\xff" * 9},
    "png_bomb": lambda: {"png": png_bomb()},
    "video_bomb": lambda: {"mp4": flat(1080, 1920, 300)},
    "playlist": lambda: {"mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"},
    "manifest": lambda: {"mp4": b'<?xml version="1.0"?><MPD><BaseURL>a.mp4</BaseURL></MPD>'},
    "edit_list": lambda: {"mp4": odd.cut_with_edit_list()},
    "no_first_keyframe": lambda: {"mp4": odd.without_first_keyframe()},
    "size_changes": lambda: {"mp4": odd.size_changes(first=1)},
    "mirrored": lambda: {"mp4": odd.with_matrix(-1, 0, 0, 1)},
    "tall_pixels": lambda: {"mp4": odd.tall_pixels()},
    "hdr": lambda: {"mp4": odd.hdr(PQ)},
    "interlaced": lambda: {"mp4": odd.interlaced()},
    "low_rate": lambda: {"mp4": odd.video(count=20, rate=1, time_base=Fraction(1))},
    "gap": lambda: {"mp4": odd.video(count=20, times=lambda n: n + (25_000 if n > 9 else 0))},
    "avi": lambda: {"mp4": odd.video(suffix="avi", codec="mpeg4", options={"bf": "2"})},
    "high_rate": lambda: {"mp4": odd.video(count=600, rate=1000, time_base=Fraction(1, 1000))},
    "several_streams": lambda: {"mkv": odd.several_streams()},
    "grey_16": lambda: {"png": grey_16()},
    "cmyk": lambda: {"jpg": still("JPEG", "CMYK")},
    "transparent": lambda: {"png": still("PNG", "RGBA")},
    "turned_image": lambda: {"jpg": turned()},
    "moving_image": lambda: {"webp": moving_webp()},
    "one_pixel": lambda: {"png": still("PNG", size=(1, 1))},
    "jpeg_named_png": lambda: {"png": still("JPEG")},
    "avif_named_jpg": lambda: {"jpg": b"\0\0\0\x1cftypavif" + bytes(500)},
    "other_image": lambda: {"tiff": still("TIFF")},
    "no_caption": lambda: {"mp4": GOOD, "txt": "  \n"},
    "caption_list": lambda: {"mp4": GOOD, "txt": "['A car.', 'A road.']"},
    "caption_utf16": lambda: {"mp4": GOOD, "txt": "Café".encode("utf-16")},
    "caption_control": lambda: {"mp4": GOOD, "txt": "a\0b \x1b[31mred \u202eabc"},
}
CAP_BYTES = 2**20


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def gzip_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(header("gzip_bomb.mp4", 2**30))
        for _ in range(128):
            file.write(bytes(1 << 20))


def sparse(path: Path) -> None:
    fields = (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=1099511627776")
    records = b"".join(b"%d %s\n" % (len(text) + 4, text) for text in fields)
    path.write_bytes(
        header("x", len(records), tarfile.XHDTYPE) + records.ljust(512, b"\0")
        + header("s.mp4", 512) + b"9" * 512 + header("good.mp4", 0) + bytes(1024)
    )  # fmt: skip


def cut(path: Path) -> None:
    tar_of(path, [("good.mp4", GOOD), ("cut_tar.mp4", GOOD)])
    path.write_bytes(path.read_bytes()[: len(GOOD) + 2048])


def folder(path: Path) -> None:
    path.mkdir()
    (path / "good.mp4").write_bytes(GOOD)
    (path / "folder_link.mp4").symlink_to(path.parent / "outside.mp4")
    os.mkfifo(path / "pipe.mp4")


def packed_tar(path: Path, name: str) -> bytes:
    part = path.with_suffix(".part")
    tar_of(part, [(name, GOOD)])
    data = part.read_bytes()
    part.unlink()
    return data


SHARDS: dict[str, Callable[[Path], Any]] = {
    "same_key": lambda p: tar_of(p, [(n, GOOD) for n in ("same_key.mp4", "b.mp4", "same_key.mp4")]),
    "gzip_bomb": gzip_bomb,
    "cut_tar": cut,
    "lying_header": lambda p: p.write_bytes(
        header("lying_header.mp4", 0) + header("x.mp4", -1024) + bytes(512)
    ),
    "no_tar": lambda p: p.write_bytes(b"junk" * 1000),
    "path_traversal": lambda p: tar_of(
        p, [("../up.mp4", GOOD), ("/abs.mp4", GOOD), ("good.mp4", GOOD)]
    ),
    "symlink_member": lambda p: tar_of(p, [(link("s.mp4", str(p.parent / "outside.mp4")), b"")]),
    "sparse_member": sparse,
    "folder_link": folder,
    "one_after_another": lambda p: p.write_bytes(
        b"".join(packed_tar(p, name) for name in ("first.mp4", "one_after_another.mp4"))
    ),
    "xz_shard": lambda p: p.write_bytes(lzma.compress(packed_tar(p, "xz_shard.mp4"))),
    "capitals": lambda p: tar_of(p, [("capitals.MP4", GOOD), ("capitals.TXT", b"A clip.")]),
    "leftover": lambda p: tar_of(p, [("leftover.f230.mp4", GOOD), ("leftover.mp4", GOOD)]),
    "several_videos": lambda p: tar_of(
        p, [(f"several_videos{end}", GOOD) for end in (".left.mp4", ".mp4", ".right.mp4")]
    ),
    "café": lambda p: tar_of(p, [("caf\udce9.mp4", GOOD), ("caf\udce8.mp4", GOOD)]),
    "other_suffix": lambda p: tar_of(p, [("other_suffix.mp4", GOOD), ("other_suffix.cap", b"A")]),
}


class Run(NamedTuple):
    """What one run over all kinds left."""

    rows: dict[str, list[dict[str, Any]]]
    """Status rows by shard."""
    manifests: dict[str, dict[str, Any]]
    written: set[Path]
    """Files that the run made anywhere near its input."""


def prepare_all(config: PrepareConfig, codec: Path, root: Path) -> Run:
    root.mkdir()
    (root / "outside.mp4").write_bytes(GOOD)
    samples = [sample(kind, **make()) for kind, make in MEDIA.items()]
    write_shard(root / "media.tar", samples)
    shards = [str(root / "media.tar")]
    for kind, make in SHARDS.items():
        suffix = {"gzip_bomb": ".tar.gz", "folder_link": ""}.get(kind, ".tar")
        make(root / f"{kind}{suffix}")
        shards.append(str(root / f"{kind}{suffix}"))
    before = set(root.rglob("*"))
    prepare_locally(config, shards, root / "out", codec)
    names = [path.stem for path in (root / "out" / "manifests").glob("*.json")]
    out = root / "out"
    return Run(
        {name: pq.read_table(out / "status" / f"{name}.parquet").to_pylist() for name in names},
        {name: json.loads((out / "manifests" / f"{name}.json").read_text()) for name in names},
        {p for p in set(root.rglob("*")) - before if not p.is_relative_to(out)},
    )


@pytest.fixture(scope="module")
def bad(config: PrepareConfig, codec_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    caps = CapConfig(max_media_bytes=CAP_BYTES)
    bucket = config.bucket.model_copy(update={"max_enlargement": 1.5})
    capped = config.model_copy(update={"caps": caps, "bucket": bucket})
    return prepare_all(capped, codec_dir, tmp_path_factory.mktemp("bad") / "in")


@pytest.fixture(scope="module")
def slow(config: PrepareConfig, codec_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A deadline that no 8K video can meet."""
    root = tmp_path_factory.mktemp("slow")
    write_shard(root / "slow.tar", [sample("slow", mp4=flat(4320, 7680, 5))])
    hasty = config.model_copy(update={"deadline_s": 0.02})
    prepare_locally(hasty, [str(root / "slow.tar")], root / "out", codec_dir)
    return Run(
        {"slow": pq.read_table(root / "out" / "status" / "slow.parquet").to_pylist()}, {}, set()
    )


@pytest.mark.parametrize("kind", TABLE)
def test_the_run_records_what_the_table_says(kind: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue("slow" if kind == "slow" else "bad")
    shard = "media" if kind in MEDIA else kind
    own = [(row["status"], row["reason"]) for row in run.rows[shard] if row["key"] == kind]
    if TABLE[kind].status == "no row":
        assert own == []
        manifest = run.manifests[kind]
        assert manifest["ignored_members"] or "not a readable tar" in manifest["error"]
    else:
        assert (TABLE[kind].status, TABLE[kind].reason) in own
        assert len(own) == (2 if kind == "same_key" else 1)


def test_what_is_bad_costs_its_neighbours_nothing(bad: Run) -> None:
    good = [row for rows in bad.rows.values() for row in rows if row["key"] in ("good", "b")]
    assert len(good) == 5
    assert {row["reason"] for row in good if row["status"] == "failed"} <= {"empty_video"}


def test_nothing_is_written_outside_the_output(bad: Run) -> None:
    assert bad.written == set()


def test_every_kind_made_here_is_in_the_table_and_every_line_is_made() -> None:
    assert set(TABLE) == {*MEDIA, *SHARDS, "slow"}


@pytest.mark.parametrize("kind", TABLE)
def test_the_further_tests_of_the_table_exist(kind: str) -> None:
    for name in TABLE[kind].tests:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
