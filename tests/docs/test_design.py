"""The numbers and names of `docs/design.md` are those of the code."""

from __future__ import annotations

import math
import re

import pytest

from data_prep.latents.records import GROUP_BYTES, HELD_OUT_SHARE
from data_prep.storage.lease import LEASE_S
from flow.aspects import ASPECTS
from flow.block import SOFTPLUS_SHIFT
from flow.codec_factors import SD_FACTORS, WAN_FACTORS
from flow.config import TIME_FREQUENCIES, FlowConfig, image_3b, video_7b
from flow.flow import DENOISE_STEP
from flow.latent_convention import LatentConvention
from flow.prompt import EXTEND_PREFIX, format_prompt
from flow.rope import BASE
from flow.sample_spec import SampleSpec
from flow.tensor_files import SHARD_BYTES
from flowreel.values import flattened
from serving.config import Limits, Resources, SamplingConfig
from serving.requests import CreateVideo
from tests.docs.code import rows, section
from tests.places import ROOT
from training.config import TrainConfig

PAGE = ROOT / "docs" / "design.md"
TEXT = " ".join(PAGE.read_text().split())
HEADINGS = (
    "Words",
    "Layout",
    "The model exactly",
    "Sampling",
    "Data preparation",
    "Training",
    "Serving",
    "Pipeline and configuration",
    "Tests and benchmarks",
    "Not yet",
)
SPEC = SampleSpec(num_frames=1, grid=(1, 1))
TRAIN = {key.split(".")[-1]: value for key, value in flattened(TrainConfig().model_dump()).items()}
"""Defaults of training by their last name, whatever group they are in."""
FACTS: dict[str, tuple[object, ...]] = {
    r"Time takes (\d+) of them": (TIME_FREQUENCIES,),
    r"frequencies \$(\d+)\^\{-k/8\}": (int(BASE),),
    r"x_\\sigma - ([\d.]+) \\, s_\\phi": (DENOISE_STEP,),
    r"window of (\d+) frames. What the look-ahead": (video_7b().denoiser_window,),
    r"(\d+) × \d+ pixels into one cell": (WAN_FACTORS.space,),
    r"(\d+) frame from the first latent frame, then (\d+) from each": (1, WAN_FACTORS.time),
    r"SD VAE \((\d+) × 8 pixels": (SD_FACTORS.space,),
    r"block of tokens at once \((\d+);": (SPEC.block_size,),
    r"a window of (\d+) tokens \((\d+) in the first frame\)": (
        SPEC.slide_tokens,
        SPEC.cold_slide_tokens,
    ),
    r"residual is at most ([\d.]+) \(([\d.]+) in the first frame\)": (
        SPEC.token_tolerance,
        SPEC.cold_token_tolerance,
    ),
    r"One key in (\d+) is held out": (HELD_OUT_SHARE,),
    r"row groups of about (\d+) MiB": (GROUP_BYTES >> 20,),
    r"not renewed for (\d+) seconds": (int(LEASE_S),),
    r"with an index from (\d+) GiB on": (SHARD_BYTES >> 30,),
    r"caption is empty with probability ([\d.]+)": (TRAIN["caption_dropout"],),
    r"After (\d+) skips in a row": (TRAIN["max_consecutive_skips"],),
    r"each gradient clipped to norm (\d+)": (TRAIN["clip_norm"],),
    r"DeepBlock may be (\d+) frames ahead": (Resources().credit_frames,),
    r"divided by \$\\bar s\$ \| ([\d.]+) \|": (LatentConvention.released().later_frame_scale,),
}


def test_the_sections_are_those_that_the_code_refers_to() -> None:
    assert tuple(re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)) == HEADINGS


@pytest.mark.parametrize("pattern", FACTS)
def test_numbers_are_those_of_the_code(pattern: str) -> None:
    found = re.search(pattern, TEXT)
    assert found, f"the page says nothing like {pattern!r}"
    assert tuple(float(value) for value in found.groups()) == tuple(
        float(str(value)) for value in FACTS[pattern]
    )


def test_the_shift_of_the_softplus_is_as_written() -> None:
    assert "softplus}(a_i + \\ln(e - 1))" in TEXT
    assert pytest.approx(math.log(math.e - 1), abs=1e-15) == SOFTPLUS_SHIFT


def test_the_template_and_the_aspects_are_as_written() -> None:
    assert ", ".join(ASPECTS) in TEXT
    example = format_prompt("a cat", fps=16, noise_std=0.5, aspect_ratio="16:9")
    assert example in PAGE.read_text()
    assert f"`{EXTEND_PREFIX}`" in PAGE.read_text()


@pytest.mark.parametrize(("column", "config"), [(1, video_7b()), (2, image_3b())])
def test_the_released_sizes_are_the_presets(column: int, config: FlowConfig) -> None:
    table = {row[0]: row[column] for row in rows(section(PAGE, "Released models"))}
    *shallow, deep = config.layers_per_block
    assert (
        table["shallow blocks"]
        == f"{len(shallow)} × {shallow[0]} layers, width {config.shallow_width}"
    )
    assert table["deep block"] == f"{deep} layers, width {config.deep_width}"
    assert table["head"] == str(config.head_dim)
    assert table["latent channels"] == str(config.latent_channels)
    sizes = f"{config.noise_std}, {config.soft_clip:g}, {config.pos_len:g}"
    assert table["σ, soft clip, `pos_len`"] == sizes
    assert table["text"] == f"{config.text_len} × {config.text_dim}"
    assert table["denoiser"].startswith(f"{config.denoiser_layers} layers") == config.denoiser


def test_what_is_said_of_serving_is_its_default() -> None:
    assert CreateVideo(prompt="a").schedule == "jacobi"
    assert SPEC.schedule == "sliding"
    assert SamplingConfig().denoiser == "learned"
    assert Limits().queue_size >= 1
