"""The same bytes become the same frames, times and words, on a quiet machine and on a busy one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.clips.decode import DecodeStage
from data_prep.config import BucketConfig, FilterConfig, PrepareConfig
from data_prep.row import Row, split_windows
from data_prep.sources.samples import read_shard
from data_prep.stages import run_stage
from media.pixels import PQ
from tests.data_prep.bad_media import moving, rotated, video, with_bars
from tests.data_prep.in_process import decode_row
from tests.data_prep.test_bad_input import damaged
from tests.media import odd_videos as odd

CONFIG = PrepareConfig(
    bucket=BucketConfig(num_frames=9, height=64, width=64, fps=8.0),
    filters=FilterConfig(crop_bars=True, progressive=False, max_gap_s=None, min_source_fps=0),
    windows_per_clip=4,
)
"""With as little dropped before decoding as may be."""
MADE: dict[str, Callable[[], bytes]] = {
    "plain": odd.video,
    "damaged": odd.damaged,
    "damaged elsewhere": lambda: odd.damaged(seed=1),
    "concealed": lambda: damaged(video(moving(60, 96, 128)), whole=False),
    "noise": lambda: damaged(video(moving(20)), whole=True),
    "cut short": lambda: odd.video()[:-3000],
    "cut short, no index": lambda: odd.video(suffix="ts")[:-3000],
    "edit list": odd.cut_with_edit_list,
    "no first keyframe": odd.without_first_keyframe,
    "size changes": odd.size_changes,
    "hdr": lambda: odd.hdr(PQ, 60),
    "interlaced": odd.interlaced,
    "gap": odd.with_gap,
    "avi": lambda: odd.video(suffix="avi", codec="mpeg4", options={"bf": "2"}),
    "boxed": lambda: video(with_bars(moving(40), 12, 16)),
    "rotated": rotated,
    "empty": lambda: b"",
}


def outcome(row: Row) -> str:
    """A digest of all that a sample has become."""
    digest = hashlib.sha256()
    for part in split_windows(row):
        names = ("status", "reason", "detail", "note", "window", "pts_s", "bars", "duration_s")
        digest.update(repr([part[name] for name in (*names, "frames_digest")]).encode())
        digest.update(part["frames"] or b"")
    return digest.hexdigest()


@contextlib.contextmanager
def busy_neighbours() -> Iterator[None]:
    """Processes that keep every core busy; they are at work on entering."""
    code = "import sys; print('at work', flush=True)\nwhile True: sum(range(9999))"
    count = os.cpu_count() or 1
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def outcomes(samples: dict[str, tuple[str, bytes]], times: int) -> dict[str, set[str]]:
    """What becomes of each sample (suffix, bytes), decoded so many times, by one new process."""
    stage = DecodeStage(CONFIG, CONFIG.bucket.all_sizes(16))
    found: dict[str, set[str]] = {name: set() for name in samples}
    with contextlib.closing(stage):
        # In turns, so that a video follows another one each time.
        for _ in range(times):
            for name, (suffix, data) in samples.items():
                row = decode_row(key=name, suffix=suffix, media=data)
                found[name].add(outcome(run_stage(stage, row)))
    return found


def assert_one_outcome(
    samples: dict[str, tuple[str, bytes]], times: int, *, processes: int = 1
) -> None:
    """Each sample has one outcome, over so many quiet decodings and as many busy ones."""
    found: dict[str, set[str]] = {name: set() for name in samples}
    for _ in range(processes):
        for neighbours in (contextlib.nullcontext(), busy_neighbours()):
            with neighbours:
                for name, digests in outcomes(samples, times // processes).items():
                    found[name] |= digests
    assert {name: len(digests) for name, digests in found.items()} == dict.fromkeys(samples, 1)


def test_each_kind_of_video_has_one_outcome() -> None:
    samples = {name: ("mp4", make()) for name, make in MADE.items()}
    assert len({data for _, data in samples.values()}) == len(samples)
    assert_one_outcome(samples, times=2)
    different = {digest for digests in outcomes(samples, 1).values() for digest in digests}
    assert len(different) > len(samples) / 2, "the digest tells outcomes apart"


def samples_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Every video and every image of a folder of odd files, and of the shards in it, once each."""
    samples: dict[str, tuple[str, bytes]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.parent.name == "shards":
            for sample in read_shard(str(path)):
                if not sample.problem:
                    samples[f"{path.name}/{sample.key}"] = (sample.suffix, sample.media)
        elif path.suffix != ".md":
            samples[path.name] = (path.suffix[1:], path.read_bytes())
    # Many a clip of the shards is one and the same: it is read under its first name.
    first_names: dict[tuple[str, bytes], str] = {}
    for name, content in samples.items():
        first_names.setdefault(content, name)
    return {name: content for content, name in first_names.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_odd_video_of_real_crawls_has_one_outcome_over_fifty_decodings(
    odd_videos: Path,
) -> None:
    assert_one_outcome(samples_of(odd_videos), times=25, processes=5)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_each_odd_input_has_one_outcome_over_fifty_decodings(odd_inputs: Path) -> None:
    assert_one_outcome(samples_of(odd_inputs), times=25, processes=5)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_each_made_kind_has_one_outcome_over_fifty_decodings() -> None:
    samples = {name: ("mp4", make()) for name, make in MADE.items()}
    assert_one_outcome(samples, times=25, processes=5)
