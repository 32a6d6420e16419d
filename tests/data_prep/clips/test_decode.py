"""The decoding stage: time-outs are tried again alone, bars are cut before the crop."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.clips.decode import DecodeStage
from data_prep.clips.machine_lock import MachineLock
from data_prep.config import FilterConfig, PrepareConfig
from data_prep.row import frames_of
from data_prep.stages import run_stage
from media.errors import DecodeTimeout, UnreadableVideo
from media.write import encode_mp4
from tests.data_prep.bad_media import moving, video, with_bars
from tests.data_prep.in_process import decode_row

SIZES = [(32, 32)]
FRAMES = np.random.default_rng(0).integers(0, 255, (20, 32, 64, 3), dtype=np.uint8)


def test_a_time_out_is_tried_once_more_alone_with_a_longer_deadline(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six decoders, every first try of three of them too slow: no second try has company."""
    lock, running, alone, deadlines = threading.Lock(), set(), [], []

    def read(name: int, data: bytes, **options: Any) -> None:
        with lock:
            running.add(name)
            deadlines.append(options["deadline_s"])
        time.sleep(0.02)
        with lock:
            if options["deadline_s"] == 6.0:
                alone.append(set(running) == {name})
            running.remove(name)
        raise DecodeTimeout("slow") if name < 3 else UnreadableVideo("broken")

    def work(name: int) -> list[str]:
        # Each has its own locks, as in a process of its own.
        hasty = config.model_copy(update={"deadline_s": 2.0})
        stage = DecodeStage(hasty, SIZES, lock=MachineLock(tmp_path))
        monkeypatch.setattr(stage.reader, "read", partial(read, name))
        return [run_stage(stage, decode_row())["reason"] for _ in range(10)]

    with ThreadPoolExecutor(6) as threads:
        reasons = list(threads.map(work, range(6)))
    assert reasons == [["decode_timeout"] * 10] * 3 + [["unreadable_video"] * 10] * 3
    assert sorted(set(deadlines)) == [2.0, 6.0]
    assert alone == [True] * 30


def test_a_clip_that_is_only_slow_beside_others_is_not_lost(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DecodeStage(config, SIZES, lock=MachineLock(tmp_path))
    read = stage.reader.read

    def slow_at_first(*arguments: Any, **options: Any) -> Any:
        if options["deadline_s"] == config.deadline_s:
            raise DecodeTimeout("busy")
        return read(*arguments, **options)

    monkeypatch.setattr(stage.reader, "read", slow_at_first)
    row = run_stage(stage, decode_row(media=encode_mp4(FRAMES, 16)))
    stage.close()
    assert row["status"] == ""
    assert frames_of(row).shape == (5, 32, 32, 3)


def test_a_stopped_process_does_not_stop_the_others(tmp_path: Path) -> None:
    with MachineLock(tmp_path).shared():
        begun = time.monotonic()
        with MachineLock(tmp_path).exclusive(patience_s=0.1) as is_alone:
            assert not is_alone
        with MachineLock(tmp_path).shared(patience_s=0.1):
            pass
        assert time.monotonic() - begun < 30
    with MachineLock(tmp_path).exclusive(patience_s=0.1) as is_alone:
        assert is_alone


def test_cropping_bars_gives_what_the_video_without_them_gives(
    config: PrepareConfig, tmp_path: Path
) -> None:
    picture = moving(20, 48, 96)
    cropping = config.model_copy(update={"filters": FilterConfig(crop_bars=True)})
    stage = DecodeStage(cropping, SIZES, lock=MachineLock(tmp_path))
    lossless = {"qp": "0", "preset": "ultrafast"}
    plain, boxed = (
        run_stage(stage, decode_row(media=video(frames, options=lossless)))
        for frames in (picture, with_bars(picture, 8, 16))
    )
    stage.close()
    assert boxed["bars"] == [8, 8, 16, 16]
    difference = frames_of(plain).astype(int) - frames_of(boxed)
    assert np.abs(difference).mean() < 1.0
