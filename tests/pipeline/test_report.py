"""The report draws what was measured, also when a step was not finite or nothing overlapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from media.write import encode_mp4
from pipeline.demo_figures import overlap_s
from pipeline.report import Sample, contact_sheet, loss_curve, timeline, write_report
from pipeline.tables import JUDGED

SUMMARY = {
    "held_out_nats_per_dim": -0.3,
    "gaussian_nats_per_dim": 0.5,
    "shuffled_caption_nats_per_dim": -0.2,
    "noise_floor_nats_per_dim": -0.7,
    **{f"{word}_accuracy": 0.5 for word in JUDGED},
    **{f"{word}_after_codec": 0.9 for word in JUDGED},
    **{f"{word}_chance": 0.2 for word in JUDGED},
    "codec_psnr_db": 26.0,
    "overlap_s": 0.1,
    "wall_s": 60.0,
    "stage_s": {"train": 30.0},
}


def history(*losses: float | None) -> list[dict[str, object]]:
    return [
        {"step": i, "mode": ("video", "image")[i % 2], "loss_nats_per_dim": loss}
        for i, loss in enumerate(losses)
    ]


def span(name: str, frame: int, start: float, end: float) -> dict[str, object]:
    return {"name": name, "frame": frame, "pid": 1, "start_s": start, "end_s": end}


def test_a_step_without_a_finite_loss_leaves_a_gap_not_an_error() -> None:
    assert "<svg" in loss_curve(history(0.5, 0.4, None, 0.3), SUMMARY)
    assert "<svg" in loss_curve(history(None, None), SUMMARY)


def test_overlap_counts_only_later_deep_frames() -> None:
    deep = [span("deep", 0, 0, 1), span("deep", 1, 1, 2), span("deep", 2, 2, 3)]
    assert overlap_s([*deep, span("decode", 0, 1, 2.5)]) == pytest.approx(1.5)
    assert overlap_s([*deep, span("decode", 2, 2, 3)]) == 0
    assert overlap_s([*deep, span("decode", 1, 0.5, 1.5)]) == 0


def test_the_timeline_names_both_processes() -> None:
    svg = timeline([span("deep", 0, 0, 1), span("decode", 0, 1, 2)])
    assert "deep block" in svg
    assert "frame decoder" in svg


def test_prompts_are_text_on_the_page_never_markup(tmp_path: Path) -> None:
    frames = np.zeros((5, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_mp4(frames, fps=8.0))
    sample = Sample("<script>alert(1)</script>", "text to video", path, frames)
    assert contact_sheet([sample]).width > 100
    page = write_report(
        tmp_path, title="t", summary=SUMMARY, samples=[sample], history=history(0.1), spans=[],
        statuses={"kept": 1},
    ).read_text()  # fmt: skip
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
