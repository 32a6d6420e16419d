"""Reading: real times, upright frames, and an error with a reason for every bad file."""

from __future__ import annotations

import io
import os
import pickle
import re
import signal
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest

import media.errors
from media.errors import (
    DecoderDied,
    DecodeTimeout,
    EmptyVideo,
    MediaError,
    UnreadableVideo,
    VideoTooLarge,
)
from media.read import VideoInfo, VideoReader
from media.write import encode_mp4
from tests.places import ROOT

ODD = Path(os.environ.get("FLOWREEL_ODD_VIDEOS", ROOT.parent / "shared" / "odd_videos"))
needs_odd = pytest.mark.skipif(not ODD.is_dir(), reason="FLOWREEL_ODD_VIDEOS is not there")


@pytest.fixture(scope="module")
def reader() -> VideoReader:
    with VideoReader() as reader:
        yield reader


@pytest.fixture(scope="module")
def video() -> bytes:
    shades = np.arange(24, dtype=np.uint8)[:, None, None, None] * 10
    return encode_mp4(np.broadcast_to(shades, (24, 32, 64, 3)).copy(), 24.0)


def test_chosen_frames_come_in_order_with_their_times(reader: VideoReader, video: bytes) -> None:
    clip = reader.read(video, choose=lambda info: [3, 3, 7, 20])
    np.testing.assert_allclose(clip.pts_s, np.array([3, 3, 7, 20]) / 24, atol=1e-4)
    np.testing.assert_allclose(clip.frames.mean((1, 2, 3)), [30, 30, 70, 200], atol=3)


def test_one_child_serves_many_videos(reader: VideoReader, video: bytes) -> None:
    before = reader.starts
    for _ in range(3):
        reader.read(video)
    assert reader.starts <= max(1, before)


def test_a_path_is_read_like_bytes(reader: VideoReader, video: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(video)
    np.testing.assert_array_equal(reader.read(path).frames, reader.read(video).frames)


def test_caps_refuse_before_decoding(reader: VideoReader, video: bytes) -> None:
    with pytest.raises(VideoTooLarge, match="64×32"):
        reader.read(video, max_pixels=1000)
    with pytest.raises(VideoTooLarge, match="24 frames wanted"):
        reader.read(video, max_frames=23)
    with pytest.raises(VideoTooLarge, match="bytes"):
        reader.read(video, max_bytes=100)


def peak_bytes(reader: VideoReader) -> int:
    """Most memory that the decoding process has held."""
    assert reader._child is not None
    status = Path(f"/proc/{reader._child.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_frames_over_the_cap_are_refused_before_one_is_decoded() -> None:
    black = np.zeros((1, 5760, 10240, 3), dtype=np.uint8)
    data = encode_mp4(black, 8, preset="ultrafast")
    with VideoReader() as reader:
        with pytest.raises(VideoTooLarge, match="10240×5760"):
            reader.read(data)
        # One such frame is 177 MB as RGB, and the decoder would hold several.
        assert peak_bytes(reader) < 300 * 2**20


def test_a_video_that_unpacks_to_gigabytes_takes_little_memory() -> None:
    black = np.broadcast_to(np.zeros((1, 1, 1, 1), dtype=np.uint8), (300, 1080, 1920, 3))
    data = encode_mp4(black, 8, preset="ultrafast")
    assert len(data) * 50_000 < black.size
    with VideoReader() as reader:
        clip = reader.read(data, transform=lambda frame_HW3: frame_HW3[:16, :16])
        assert clip.frames.shape == (300, 16, 16, 3)
        assert peak_bytes(reader) < 300 * 2**20


def test_a_file_without_video_is_empty_whatever_else_it_holds(reader: VideoReader) -> None:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    with pytest.raises(EmptyVideo, match="no video stream"):
        reader.read(sound.getvalue())


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_container_that_promises_more_than_it_holds_is_unreadable(
    reader: VideoReader, share: float
) -> None:
    rng = np.random.default_rng(0)
    data = encode_mp4(rng.integers(0, 255, (16, 32, 32, 3), dtype=np.uint8), 8)
    with pytest.raises((UnreadableVideo, EmptyVideo)):
        reader.read(data[: int(len(data) * share)], deadline_s=20)


@pytest.mark.parametrize("data", [b"\0" * 4096, b"not a video at all", os.urandom(5000)])
def test_other_bytes_are_unreadable(reader: VideoReader, data: bytes) -> None:
    with pytest.raises(UnreadableVideo):
        reader.read(data, deadline_s=20)


def test_no_bytes_are_an_empty_video(reader: VideoReader) -> None:
    with pytest.raises(EmptyVideo, match="0 bytes"):
        reader.read(b"")


def test_the_same_damage_gives_the_same_message(reader: VideoReader, video: bytes) -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(UnreadableVideo) as caught:
            reader.read(video[: len(video) // 2])
        messages.add(str(caught.value))
        time.sleep(1.1)
    assert len(messages) == 1


def test_a_decoder_that_hangs_is_killed_and_the_next_video_is_read(video: bytes) -> None:
    with VideoReader() as reader:
        reader.read(video)
        assert reader._child is not None
        stuck = reader._child.pid
        os.kill(stuck, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(DecodeTimeout, match=r"0\.5 s"):
            reader.read(video, deadline_s=0.5)
        assert time.monotonic() - begun < 5
        with pytest.raises(ProcessLookupError):
            os.kill(stuck, 0)
        assert len(reader.read(video).frames) == 24
        assert reader.starts == 2


def test_a_decoder_that_crashes_costs_one_video(video: bytes) -> None:
    with VideoReader() as reader:
        reader.read(video)
        assert reader._child is not None
        stopped = reader._child.pid
        os.kill(stopped, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (stopped, signal.SIGKILL)).start()
        with pytest.raises(DecoderDied, match="code -9"):
            reader.read(video, deadline_s=20)
        assert len(reader.read(video).frames) == 24


def test_what_choose_raises_comes_through_and_the_reader_lives(
    reader: VideoReader, video: bytes
) -> None:
    def choose(info: VideoInfo) -> list[int]:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        reader.read(video, choose=choose)
    assert len(reader.read(video).frames) == 24


def all_kinds(kind: type[MediaError] = MediaError) -> list[type[MediaError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in all_kinds(child))]


def test_the_tree_of_errors_is_as_drawn() -> None:
    def tree(kind: type[MediaError], depth: int = 0) -> set[tuple[int, str, str]]:
        rows = {(depth, kind.__name__, kind.reason)}
        return rows.union(*(tree(child, depth + 1) for child in kind.__subclasses__()))

    row = re.compile(r"^    ((?:│   |    )*)[└├]── (\w+) +([a-z_]+)", flags=re.MULTILINE)
    rows = row.findall(media.errors.__doc__ or "")
    assert {(len(indent) // 4, name, reason) for indent, name, reason in rows} == tree(MediaError)


def test_a_file_that_is_not_there_is_named_as_a_user_wrote_it(reader: VideoReader) -> None:
    with pytest.raises(UnreadableVideo, match=r"^/no/such\.mp4: No such file"):
        reader.read(Path("/no/such.mp4"))


def test_errors_survive_pickling() -> None:
    kinds = all_kinds()
    assert len({kind.reason for kind in kinds}) == len(kinds)
    for kind in kinds:
        back = pickle.loads(pickle.dumps(kind("what and why")))
        assert type(back) is kind
        assert str(back) == "what and why"


@needs_odd
def test_av1_in_matroska_is_read(reader: VideoReader) -> None:
    clip = reader.read(ODD / "av1.mkv", choose=lambda info: range(100, 110))
    assert clip.frames.shape == (10, 360, 640, 3)
    assert clip.duration_s == pytest.approx(5.0)


@needs_odd
def test_a_phone_video_stands_upright(reader: VideoReader) -> None:
    clip = reader.read(ODD / "rotated_90.mov")
    assert clip.frames.shape == (3, 568, 320, 3)
    assert clip.info.facts["orientation"] == "turned right"


@needs_odd
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("corrupted.mp4", "unreadable_video"),
        ("truncated.mp4", "unreadable_video"),
        ("empty.mp4", "empty_video"),
    ],
)
def test_files_of_real_crawls_fail_with_a_reason(
    reader: VideoReader, name: str, reason: str
) -> None:
    with pytest.raises(MediaError) as caught:
        reader.read(ODD / name)
    assert caught.value.reason == reason


@needs_odd
def test_h265_is_read(reader: VideoReader) -> None:
    assert reader.read(ODD / "h265.mp4").frames.shape == (10, 128, 128, 3)


def test_a_relative_path_is_this_processs_whatever_folder_the_child_began_in(
    reader: VideoReader, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.read(video)
    (tmp_path / "a.mp4").write_bytes(video)
    monkeypatch.chdir(tmp_path)
    assert len(reader.read(Path("a.mp4")).frames) == 24
