"""The pass benchmark: its count of bytes and operations, and a whole small run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.iteration import SMALL, Cost, Rates, cost_of, main
from flow.config import PRESETS


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    rates = Rates(bytes_per_s=1e9, flop_per_s=1e12)
    assert Cost(num_bytes=2e9, flop=1e12).floor_ms(rates) == pytest.approx(2000)
    assert Cost(num_bytes=1e9, flop=3e12).floor_ms(rates) == pytest.approx(3000)


def test_the_released_shape_moves_what_its_weights_and_cache_weigh() -> None:
    config = PRESETS["video-7b"]()
    empty = cost_of(config, 0, 1, torch.bfloat16)
    assert empty.num_bytes == pytest.approx(2 * 4.83e9, rel=0.01)
    full = cost_of(config, 17_000, 128, torch.bfloat16)
    # Two sequences, keys and values, 24 layers of 4096 numbers of two bytes per place.
    assert full.num_bytes - empty.num_bytes == pytest.approx(17_127 * 2 * 2 * 24 * 4096 * 2)
    assert full.flop > 128 * empty.flop


def test_a_small_run_prints_time_and_floor(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "small", "--context", "20", "300", "--window", "4", "--repeats", "1"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line, context in zip(lines[3:], (20, 300), strict=True):
        columns = line.split()
        assert columns[:2] == [str(context), "4"]
        assert float(columns[2]) > 0
    assert SMALL.deep_width == 256
