"""Video in: frames with their real times, decoded in a process that can be killed.

One reader, PyAV, decides what every file is and what its frames are (`media.source`). A decoder
may loop forever or crash on a lying container; it does so in a child (`media.read_child`), which
has no network and which the parent kills at the deadline and starts anew for the next video. The
child lives as long as its `VideoReader`, so its start-up is paid once.

The caller says which frames it wants. The errors and their reason codes are those of
`media.errors`. Knows nothing of buckets, captions or Ray.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from media.errors import (
    DecoderDied,
    DecodeTimeout,
    EmptyVideo,
    NamesOtherFiles,
    SizeChanges,
    UnreadableVideo,
    VideoError,
    VideoTooLarge,
)
from media.frames import Frames
from media.framing import HEAD, packed

Choose = Callable[["VideoInfo"], Sequence[int]]
Transform = Callable[[Frames], Frames]

_ERRORS: dict[str, type[VideoError]] = {
    kind.reason: kind
    for kind in (EmptyVideo, UnreadableVideo, VideoTooLarge, NamesOtherFiles, SizeChanges)
}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before its frames are chosen. Times are exact.

    >>> ticks = np.arange(9, dtype=np.int64)
    >>> VideoInfo(64, 32, Fraction(8), ticks, time_base=Fraction(1, 8), facts={}).duration_s
    1.125
    """

    width: int
    height: int
    """Pixels as shown: upright, square."""
    rate: Fraction | None
    """Average source rate, frames per second; None where the container does not say."""
    ticks: npt.NDArray[np.int64]
    """[N] presentation times, rising from 0, in units of `time_base`."""
    time_base: Fraction
    """Seconds of a tick."""
    facts: dict[str, Any]
    """What the container says, as `media.source.Source.facts` has it: codec, orientation, transfer,
    interlacing, pixel aspect, packets hidden by edit lists or before the first keyframe."""

    @property
    def num_frames(self) -> int:
        """Frames of the whole video."""
        return len(self.ticks)

    @property
    def fps(self) -> float:
        """Average source rate; 0 where the container does not say."""
        return float(self.rate or 0)

    @property
    def pts_s(self) -> npt.NDArray[np.float64]:
        """[N] presentation times in seconds, from 0."""
        return self.ticks * self.time_base.numerator / self.time_base.denominator

    @property
    def duration_s(self) -> float:
        """Until the last frame ends, its length taken from the median step."""
        if self.num_frames < 2:
            return 1.0 / self.fps if self.fps > 0 else 0.0
        step = np.median(np.diff(self.ticks))
        return float((int(self.ticks[-1]) + step) * self.time_base)


@dataclass(frozen=True)
class Clip:
    """Decoded frames of one video."""

    frames: Frames
    """uint8 [T, H, W, 3] (after the caller's transform, if one was given)."""
    pts_s: npt.NDArray[np.float64]
    """[T] presentation time of each frame, seconds from the start of the video."""
    fps: float
    """Average rate of the source, frames per second."""
    duration_s: float
    """Length of the source in seconds."""
    info: VideoInfo
    """What was known of the whole video."""


class VideoReader:
    """A decoding child and its clock. Use one for many videos; close it (or use `with`).

    Threads may share a reader: the child decodes one video at a time.

    >>> from media.write import encode_mp4
    >>> data = encode_mp4(np.zeros((9, 32, 64, 3), np.uint8), fps=8)
    >>> with VideoReader() as reader:
    ...     clip = reader.read(data, choose=lambda info: [0, 4, 8])
    >>> clip.frames.shape, clip.pts_s.round(3).tolist()
    ((3, 32, 64, 3), [0.0, 0.5, 1.0])
    """

    def __init__(self, *, memory_bytes: int = 8 * 2**30) -> None:
        """`memory_bytes` caps the child's address space (8 GiB holds any sane 4K video)."""
        self._memory_bytes = memory_bytes
        self._child: subprocess.Popen[bytes] | None = None
        # A request and its replies belong together: nobody else may speak with the child between.
        self._lock = threading.Lock()
        self.starts = 0

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child. The reader may be used again: it starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def probe(
        self,
        data: bytes | Path | str,
        *,
        deadline_s: float = 30.0,
        max_pixels: int = 33_177_600,
        max_bytes: int = 2**30,
    ) -> VideoInfo:
        """Sizes, times and what else the container says. Errors as in `read`."""
        with self._lock:
            clock = _Clock(deadline_s)
            self._load(data, max_bytes, clock)
            return self._open(max_pixels, clock)

    def read(
        self,
        data: bytes | Path | str,
        *,
        choose: Choose | None = None,
        transform: Transform | None = None,
        deadline_s: float = 30.0,
        max_frames: int = 512,
        max_pixels: int = 33_177_600,
        max_bytes: int = 2**30,
    ) -> Clip:
        """Decode the frames that `choose` names (all of them by default), in its order.

        Args:
            data: the file's bytes, or its path.
            choose: VideoInfo -> frame indices, not falling (repeats allowed). It may raise.
            transform: applied to each frame [H, W, 3] as it arrives, so that a long clip of
                large frames is never held whole.
            deadline_s: seconds for everything; the child is killed then.
            max_frames: most frames returned.
            max_pixels: most pixels in a frame (default 8K).
            max_bytes: most bytes in the file.

        Raises:
            VideoError: one of `media.errors`; the next call works again.
        """
        with self._lock:
            clock = _Clock(deadline_s)
            self._load(data, max_bytes, clock)
            info = self._open(max_pixels, clock)
            indices = range(info.num_frames) if choose is None else choose(info)
            if len(indices) > max_frames:
                raise VideoTooLarge(
                    f"{len(indices)} frames wanted; the cap is {max_frames}. "
                    "Choose fewer frames or raise max_frames"
                )
            frames = self._frames([int(i) for i in indices], transform, clock)
            times_s = info.pts_s[np.asarray(indices, dtype=np.int64)]
            return Clip(frames, times_s, info.fps, info.duration_s, info)

    def _load(self, data: bytes | Path | str, max_bytes: int, clock: _Clock) -> None:
        in_memory = isinstance(data, bytes | bytearray | memoryview)
        try:
            size_bytes = len(data) if in_memory else os.stat(data).st_size  # type: ignore[arg-type]
        except OSError as error:
            raise UnreadableVideo(f"{data!s}: {error.strerror}") from error
        if size_bytes == 0:
            raise EmptyVideo("the video has 0 bytes")
        if size_bytes > max_bytes:
            raise VideoTooLarge(f"the video has {size_bytes} bytes; the cap is {max_bytes}")
        # The child keeps the folder that it was started in; a relative path is this process's.
        head = {"op": "load"} if in_memory else {"op": "load", "path": os.path.abspath(data)}
        self._request(head, clock, bytes(data) if in_memory else b"")  # type: ignore[arg-type]
        self._reply(clock)

    def _open(self, max_pixels: int, clock: _Clock) -> VideoInfo:
        if self._child is None:
            # `_load` gave the video to a child that has died since: a new one would not have it.
            raise DecoderDied("the decoding process ended while it read this video")
        self._request({"op": "open", "max_pixels": max_pixels}, clock)
        facts, payload = self._reply(clock)
        del facts["bytes"]
        ticks = np.frombuffer(payload, dtype=np.int64)
        rate = facts["rate"]
        return VideoInfo(
            width=facts["width"],
            height=facts["height"],
            rate=None if rate is None else Fraction(*rate),
            ticks=ticks - ticks[0],
            time_base=Fraction(*facts["time_base"]),
            facts=facts,
        )

    def _frames(self, indices: list[int], transform: Transform | None, clock: _Clock) -> Frames:
        if not indices:
            raise EmptyVideo("no frame was chosen")
        if any(b < a for a, b in itertools.pairwise(indices)) or indices[0] < 0:
            raise ValueError(f"frame indices must not fall and start at 0 or later; got {indices}")
        self._request({"op": "frames", "indices": indices}, clock)
        frames: list[Frames] = []
        for _ in indices:
            head, payload = self._reply(clock)
            frame_HW3 = np.frombuffer(payload, dtype=np.uint8).reshape(head["shape"])
            frames.append(frame_HW3 if transform is None else transform(frame_HW3))
        return np.stack(frames)

    def _request(self, head: dict[str, Any], clock: _Clock, payload: bytes = b"") -> None:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = _start_child(self._memory_bytes)
            self.starts += 1
        pipe = self._child.stdin
        assert pipe is not None
        # The pipe does not block: a child that has stopped reading must not stop the clock here.
        view = memoryview(packed(head, len(payload)) + payload)
        while view:
            _, ready, _ = select.select([], [pipe], [], clock.left_s())
            if not ready:
                self._timed_out(clock)
            try:
                view = view[os.write(pipe.fileno(), view[:_CHUNK_BYTES]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._died()

    def _reply(self, clock: _Clock) -> tuple[dict[str, Any], bytearray]:
        head = json.loads(self._exactly(HEAD.unpack(self._exactly(HEAD.size, clock))[0], clock))
        payload = self._exactly(head["bytes"], clock)
        if "error" in head:
            raise _ERRORS.get(head["error"], UnreadableVideo)(head["message"])
        return head, payload

    def _exactly(self, num_bytes: int, clock: _Clock) -> bytearray:
        assert self._child is not None
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        buffer = bytearray(num_bytes)
        view, filled = memoryview(buffer), 0
        while filled < num_bytes:
            ready, _, _ = select.select([descriptor], [], [], clock.left_s())
            if not ready:
                self._timed_out(clock)
            count = os.readv(descriptor, [view[filled : filled + _CHUNK_BYTES]])
            if not count:
                self._died()
            filled += count
        return buffer

    def _timed_out(self, clock: _Clock) -> None:
        self.close()
        raise DecodeTimeout(
            f"not decoded within {clock.deadline_s:g} s; the decoder was stopped. "
            "Raise deadline_s if the machine is slow"
        )

    def _died(self) -> None:
        child = self._child
        assert child is not None
        code = child.wait(timeout=5)
        self.close()
        raise DecoderDied(f"the decoding process ended with code {code} on this video")


class _Clock:
    """Seconds left until a deadline."""

    def __init__(self, deadline_s: float) -> None:
        if not deadline_s > 0:
            raise ValueError(f"deadline_s is {deadline_s}; it must be more than 0 seconds")
        self.deadline_s = deadline_s
        self._end = time.monotonic() + deadline_s

    def left_s(self) -> float:
        """Seconds left, never less than 0."""
        return max(0.0, self._end - time.monotonic())


def _start_child(memory_bytes: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[1])
    # The child finds this checkout and no other, whatever the working folder holds.
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from media.read_child import main; "
        f"main({memory_bytes})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("LD_PRELOAD", None)
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        bufsize=0,
        start_new_session=True,
    )
    assert child.stdin is not None
    os.set_blocking(child.stdin.fileno(), False)
    return child


_shared: dict[int, VideoReader] = {}


def _shared_reader() -> VideoReader:
    """One reader per process, for callers that do not keep their own."""
    if os.getpid() not in _shared:
        _shared[os.getpid()] = reader = VideoReader()
        atexit.register(reader.close)
    return _shared[os.getpid()]


def read_video(data: bytes | Path | str, **options: Any) -> Clip:
    """`VideoReader.read` with the reader that this process shares. Same arguments and errors."""
    return _shared_reader().read(data, **options)


def probe_video(data: bytes | Path | str, **options: Any) -> VideoInfo:
    """`VideoReader.probe` with the reader that this process shares. Same arguments and errors."""
    return _shared_reader().probe(data, **options)
