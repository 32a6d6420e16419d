"""Video readers side by side: which is fastest, and which gives the frames of the wanted times.

    python -m benchmarks.readers                      on clips made here
    python -m benchmarks.readers /data/panda/*.tar    on your own shards or videos

Every reader opens each video from memory, one thread, and decodes one window as preparation cuts
it. Ours (`media.source`) is compared with decord and torchcodec where they are installed. Frames
are held against ours, by the mean absolute difference of pixels: other frames show
at once. CPU seconds are of this process; the ratio is to ours, in one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from media.frames import Frames
from media.source import Refusal, open_source

NUM_FRAMES, FPS = 17, 8.0
MAX_PIXELS = 33_177_600
Reader = Callable[[bytes, Sequence[float]], Frames]


def ours(data: bytes, times_s: Sequence[float]) -> Frames:
    """`media.source`, in this process."""
    source = open_source(data, MAX_PIXELS)
    pts_s = source.ticks * float(source.time_base)
    return np.stack([*source.frames(_nearest(pts_s - pts_s[0], times_s))])


def decord(data: bytes, times_s: Sequence[float]) -> Frames:
    """decord, which reads by its own index of the file."""
    import decord as library

    reader = library.VideoReader(io.BytesIO(data), num_threads=1)
    pts_s = np.asarray(reader.get_frame_timestamp(np.arange(len(reader)))[:, 0], dtype=np.float64)
    return np.asarray(reader.get_batch(_nearest(pts_s - pts_s[0], times_s)).asnumpy())


def torchcodec(data: bytes, times_s: Sequence[float]) -> Frames:
    """torchcodec, which needs FFmpeg's libraries on the machine."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    begin_s = decoder.metadata.begin_stream_seconds or 0.0
    return np.asarray(decoder.get_frames_played_at([t + begin_s for t in times_s]).data.numpy())


READERS: dict[str, Reader] = {"ours (PyAV)": ours, "decord": decord, "torchcodec": torchcodec}
_MODULES = {"decord": "decord", "torchcodec": "torchcodec"}


def _nearest(pts_s: np.ndarray, times_s: Sequence[float]) -> list[int]:
    return [int(np.abs(pts_s - time_s).argmin()) for time_s in times_s]


def window_of(data: bytes) -> list[float]:
    """The times of one window, from a third of the video on; shorter where the video is."""
    source = open_source(data, MAX_PIXELS)
    length_s = float((int(source.ticks[-1]) - int(source.ticks[0])) * source.time_base)
    first_s = max(0.0, (length_s - (NUM_FRAMES - 1) / FPS) / 3)
    return [first_s + n / FPS for n in range(NUM_FRAMES) if first_s + n / FPS <= length_s]


def videos_at(paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the videos in files and tars."""
    for path in paths:
        if path.suffix != ".tar":
            yield path.name, path.read_bytes()
            continue
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".mp4") else None
                if file is not None:
                    yield member.name, file.read()


def made_videos(count: int) -> Iterator[tuple[str, bytes]]:
    """Clips of moving shapes at the size of a small film."""
    from data_prep.world.draw import random_scene
    from data_prep.world.render import render_clip
    from media.write import encode_mp4

    for seed in range(count):
        frames = render_clip(random_scene(seed), 120, 24.0, 360, 640)
        yield f"made {seed}", encode_mp4(frames, 24.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read everything with every reader and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="videos or WebDataset tars")
    parser.add_argument("--clips", type=int, default=8, help="clips to make where no path is given")
    chosen = parser.parse_args(arguments)
    videos = [*videos_at(chosen.paths)] if chosen.paths else [*made_videos(chosen.clips)]
    truth: dict[str, Frames] = {}
    windows: dict[str, list[float]] = {}
    for name, data in videos:
        try:
            windows[name] = window_of(data)
            truth[name] = ours(data, windows[name])
        except Refusal as refusal:
            print(f"  ours refuses {name}: {refusal}")
    videos = [(name, data) for name, data in videos if name in truth]
    print(f"{len(videos)} videos, windows of {NUM_FRAMES} frames at {FPS:g} fps")
    print(f"{'reader':14} {'CPU s':>8} {'of ours':>8} {'read':>6} {'same frames':>12}")
    baseline_s = 0.0
    for reader_name, read in READERS.items():
        module = _MODULES.get(reader_name)
        if module is not None and importlib.util.find_spec(module) is None:
            print(f"{reader_name:14} not installed")
            continue
        read_count = same = 0
        spent_s = 0.0
        for name, data in videos:
            begun_s = time.process_time()
            try:
                frames = read(data, windows[name])
            except Exception as error:  # a reader of others may raise anything; it is printed
                print(f"  {reader_name}: {name}: {type(error).__name__}")
                continue
            finally:
                spent_s += time.process_time() - begun_s
            read_count += 1
            alike = frames.shape == truth[name].shape
            same += alike and bool(np.abs(frames.astype(int) - truth[name]).mean() < 4)
        baseline_s = baseline_s or spent_s
        ratio = spent_s / baseline_s
        print(f"{reader_name:14} {spent_s:8.2f} {ratio:8.2f} {read_count:6} {same:12}")


if __name__ == "__main__":
    main()
