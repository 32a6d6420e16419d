"""What a run says of itself on the way: rate, time left and bottleneck, of its last minute."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.progress import WINDOW_S, Busy, Pace, RunState, Tally


def receipt(shard: str, number: int, status: str = "kept", **values: Any) -> dict[str, Any]:
    row = {"shard": shard, "number": number, "status": status, "reused": False, "committed": False}
    return {**row, **values}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_tally_is_that_of_the_receipts_in_any_order() -> None:
    receipts = [receipt("a", 0), receipt("b", 0, "failed"), receipt("a", 1, "dropped", reused=True)]
    states = []
    for order in (receipts, receipts[::-1]):
        tally = Tally(shards=2, of_shards=6)
        for row in [*order, receipt("a", -1, "", committed=True)]:
            tally.take(row)
        states.append(tally.state({}))
        assert tally.reused == 1
    assert states[0] == states[1]
    state = states[0]
    assert (state.shards, state.of_shards, state.samples) == (3, 6, 3)
    assert state.by_status == {"kept": 1, "failed": 1, "dropped": 1}
    # The finished shard held 2 samples, and so will about 3 more; one of them is done.
    assert state.samples_left == 3 * 2 - 1


def test_before_a_shard_is_finished_nobody_knows_how_many_samples_are_left() -> None:
    tally = Tally(shards=0, of_shards=2)
    tally.take(receipt("a", 0))
    assert tally.state({}).samples_left is None


def test_the_rate_is_that_of_the_last_minute_and_leaves_the_start_up_out() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.take(RunState(0, 9))  # a codec is loaded for ten minutes
    clock.now_s, samples = 600.0, 0
    assert pace.samples_per_s is None
    for rate in (10, 2):  # fast for two minutes, then slow for two
        for _ in range(120):
            samples += rate
            clock.now_s += 1.0
            pace.take(RunState(0, 9, samples, {}, samples_left=60))
    assert pace.samples_per_s == pytest.approx(2.0)
    assert pace.left_s == pytest.approx(30.0)


def test_the_bottleneck_is_the_stage_whose_workers_are_busiest() -> None:
    clock = Clock()
    pace = Pace(clock)
    for second in range(int(3 * WINDOW_S)):
        clock.now_s = float(second)
        stages = {
            "decode": Busy(workers=4, spent_s=second * 2.0),  # half of four
            "encode": Busy(workers=1, spent_s=second * 0.9),
        }
        pace.take(RunState(0, 9, second + 1, {}, stages=stages))
    assert pace.bottleneck is not None
    stage, share = pace.bottleneck
    assert stage == "encode"
    assert share == pytest.approx(0.9)


def test_a_long_run_holds_a_minute_of_points_however_often_it_is_told() -> None:
    clock = Clock()
    pace = Pace(clock)
    for tick in range(20_000):
        clock.now_s = tick / 50
        pace.take(RunState(0, 9, tick + 1))
    assert len(pace._points) <= WINDOW_S + 4
    assert pace.samples_per_s == pytest.approx(50.0, rel=0.01)
