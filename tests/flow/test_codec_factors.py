"""A codec's factors: arithmetic that inverts, and refusals that name the nearest counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flow.codec_factors import SD_FACTORS, WAN_FACTORS, CodecError, CodecFactors, read_factors
from tests.places import TINY_CODEC
from tests.tiny_codec import wan_like


@pytest.mark.parametrize("factors", [WAN_FACTORS, SD_FACTORS, CodecFactors(space=4, time=2)])
def test_latent_frames_and_video_frames_undo_each_other(factors: CodecFactors) -> None:
    for latent_frames in range(1, 30):
        video_frames = factors.video_frames(latent_frames)
        assert factors.takes(video_frames)
        assert factors.latent_frames(video_frames) == latent_frames
        behind = [frame for n in range(latent_frames) for frame in factors.frames_behind(n)]
        assert behind == [*range(video_frames)]


def test_counts_and_sides_that_do_not_fit_are_refused_with_the_nearest_ones() -> None:
    with pytest.raises(CodecError, match=r"80 frames: .* nearest counts are 77 and 81"):
        WAN_FACTORS.latent_frames(80)
    with pytest.raises(CodecError, match=r"height 40 pixels: .* multiple of 16: use 32, 48"):
        WAN_FACTORS.grid(40, 64)
    with pytest.raises(CodecError, match=r"width 8 pixels: .* use 16"):
        WAN_FACTORS.grid(32, 8)
    assert WAN_FACTORS.grid(480, 848) == (30, 53)


def test_they_are_read_from_a_codecs_folder_or_its_folder_vae(tmp_path: Path) -> None:
    assert read_factors(TINY_CODEC) == WAN_FACTORS
    (tmp_path / "vae").mkdir()
    config = wan_like(4, scale_factor_temporal=2, scale_factor_spatial=8)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert read_factors(tmp_path) == CodecFactors(space=8, time=2)
    with pytest.raises(CodecError, match="no codec at"):
        read_factors(tmp_path / "vae" / "nowhere")
