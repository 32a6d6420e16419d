"""The right frames of every odd video: their numbers and colours are read off the picture."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from media.errors import MediaError, NamesOtherFiles, SizeChanges, VideoError
from media.pixels import HLG, PQ, Orientation, orientation_of
from media.read import Clip, VideoInfo, VideoReader
from tests.media import odd_videos as odd


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    with VideoReader() as reader:
        yield reader


def every_seventh(info: VideoInfo) -> list[int]:
    return sorted({*range(0, info.num_frames, 7), info.num_frames - 1})


def numbers(clip: Clip) -> list[int]:
    return [odd.number_in(frame) for frame in clip.frames]


def assert_colours(clip: Clip, tolerance: int = 6) -> None:
    for frame in clip.frames:
        assert np.abs(odd.colours_in(frame) - np.array(odd.COLOURS)).max() <= tolerance


@functools.cache
def plain() -> bytes:
    return odd.video()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv", "avi"])
def test_frames_are_those_of_their_times_in_every_container(
    reader: VideoReader, suffix: str
) -> None:
    codec = "mpeg4" if suffix in ("avi", "flv") else "libx264"
    codec = "flv" if suffix == "flv" else codec
    options = {"b": "4000000", "bf": "2"} if codec == "mpeg4" else {}
    clip = reader.read(odd.video(suffix=suffix, codec=codec, options=options), choose=every_seventh)
    assert clip.info.num_frames == 100
    assert numbers(clip) == every_seventh(clip.info)
    assert clip.info.duration_s == pytest.approx(4.0, abs=0.05)


def test_times_are_exact_rationals(reader: VideoReader) -> None:
    info = reader.probe(odd.video(rate=24, time_base=Fraction(1001, 24000), count=30))
    times = [int(tick) * info.time_base for tick in info.ticks]
    assert times == [n * Fraction(1001, 24000) for n in range(30)]


def test_a_cut_by_edit_list_shows_no_hidden_frame(reader: VideoReader) -> None:
    clip = reader.read(odd.cut_with_edit_list())
    assert numbers(clip) == list(range(25, 100))
    assert clip.pts_s[0] == 0
    assert clip.info.duration_s == pytest.approx(3.0)
    assert clip.info.facts["hidden_packets"] == 25


def test_without_its_first_keyframe_a_video_begins_at_the_next(reader: VideoReader) -> None:
    clip = reader.read(odd.without_first_keyframe())
    assert numbers(clip) == list(range(50, 100))
    assert clip.info.facts["packets_before_keyframe"] == 17


def test_a_window_after_a_change_of_size_is_refused_and_one_before_it_read(
    reader: VideoReader,
) -> None:
    data = odd.size_changes()
    before = reader.read(data, choose=lambda info: range(40))
    assert numbers(before) == list(range(40))
    with pytest.raises(SizeChanges, match="256×144"):
        reader.read(data)


@pytest.mark.parametrize(
    ("matrix", "orientation"),
    [
        ((-1, 0, 0, 1), Orientation(flip_columns=True)),
        ((1, 0, 0, -1), Orientation(flip_rows=True)),
        ((-1, 0, 0, -1), Orientation(flip_rows=True, flip_columns=True)),
        ((0, 1, -1, 0), Orientation(transpose=True, flip_columns=True)),
        ((0, -1, 1, 0), Orientation(transpose=True, flip_rows=True)),
        ((0, 1, 1, 0), Orientation(transpose=True)),
    ],
    ids=["mirrored", "upside_down", "half", "right", "left", "transposed"],
)
def test_a_display_matrix_moves_every_corner_where_it_says(
    reader: VideoReader, matrix: tuple[int, int, int, int], orientation: Orientation
) -> None:
    clip = reader.read(odd.with_matrix(*matrix), choose=lambda info: [5])
    assert clip.info.facts["orientation"] == str(orientation)
    a, b, c, d = matrix
    corners = ((-1, -1), (1, -1), (-1, 1), (1, 1))
    shown = {(a * x + c * y, b * x + d * y): odd.COLOURS[n] for n, (x, y) in enumerate(corners)}
    frame, quarter = clip.frames[0], odd.SIDE // 4
    for (x, y), colour in shown.items():
        # A little inside the corner's field, off the bits at the stored picture's top.
        row, column = odd.SIDE // 2 + y * quarter // 2, odd.SIDE // 2 + x * quarter // 2
        assert np.abs(frame[row, column].astype(int) - colour).max() <= 6


def test_a_matrix_between_right_angles_leaves_the_picture_alone() -> None:
    assert orientation_of(None) == Orientation()
    assert orientation_of(b"\0" * 36) == Orientation()


def test_pixels_that_are_no_squares_are_shown_in_shape(reader: VideoReader) -> None:
    clip = reader.read(odd.tall_pixels())
    assert clip.frames.shape[1:3] == (256, 256)
    assert numbers(clip) == list(range(20))
    assert_colours(clip)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_comes_out_in_the_colours_it_was_made_from(reader: VideoReader, transfer: int) -> None:
    clip = reader.read(odd.hdr(transfer))
    assert clip.info.facts["transfer"] == ("pq" if transfer == PQ else "hlg")
    assert numbers(clip) == list(range(20))
    assert_colours(clip, tolerance=12)


def test_interlacing_is_told(reader: VideoReader) -> None:
    assert reader.probe(odd.interlaced()).facts["interlaced"]
    assert not reader.probe(plain()).facts["interlaced"]


def test_the_main_stream_is_the_film(reader: VideoReader) -> None:
    clip = reader.read(odd.several_streams())
    assert clip.frames.shape == (20, odd.SIDE, odd.SIDE, 3)
    assert clip.info.facts["video_streams"] == 2


def test_a_gap_stands_in_the_times(reader: VideoReader) -> None:
    info = reader.probe(odd.with_gap())
    assert np.diff(info.pts_s).max() == pytest.approx(30.04)


@pytest.mark.parametrize(
    "make",
    [plain, odd.damaged, odd.cut_with_edit_list, odd.without_first_keyframe, odd.size_changes],
)
def test_the_same_bytes_give_the_same_frames_every_time(make: Callable[[], bytes]) -> None:
    data = make()
    outcomes = set()
    for _ in range(3):
        with VideoReader() as reader:
            for _ in range(4):
                try:
                    clip = reader.read(data, choose=every_seventh)
                    outcomes.add((clip.frames.tobytes(), clip.pts_s.tobytes()))
                except VideoError as error:
                    outcomes.add((error.reason, str(error)))
    assert len(outcomes) == 1


class Listening(http.server.ThreadingHTTPServer):
    """A server on this machine that remembers whether anybody came."""

    def __init__(self) -> None:
        self.visits: list[str] = []
        listening = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listening.visits.append(self.path)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        super().__init__(("127.0.0.1", 0), Handler)


def test_no_file_makes_the_reader_open_another_or_ask_a_host(
    reader: VideoReader, tmp_path: Path
) -> None:
    (tmp_path / "secret.mp4").write_bytes(plain())
    server = Listening()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        for name, data in odd.playlists(tmp_path, url):
            for given in (data, _written(tmp_path / "x.mp4", data)):
                with pytest.raises(NamesOtherFiles):
                    reader.read(given)
                assert not server.visits, f"{name} made the reader ask {server.visits}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_movie_that_refers_to_another_file_does_not_open_it(
    reader: VideoReader, tmp_path: Path
) -> None:
    # A data reference box of QuickTime may hold a path instead of "in this file".
    (tmp_path / "secret.mp4").write_bytes(plain())
    data = bytearray(plain())
    at = data.index(b"url \0\0\0\x01")
    data[at : at + 8] = b"alis\0\0\0\0"
    try:
        clip = reader.read(bytes(data), choose=lambda info: [0])
    except MediaError:
        return
    assert odd.number_in(clip.frames[0]) == 0
