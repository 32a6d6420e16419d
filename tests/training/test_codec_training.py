"""Training a codec: it learns, it is reproducible, and what ships here is as good as it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from data_prep.world.draw import random_scene
from data_prep.world.judge import judge
from data_prep.world.prompts import prompts
from data_prep.world.render import render_clip
from flow.codec import VideoCodec, build_vae
from flowreel.errors import FlowreelError
from pipeline.recipes import SHAPES_CODEC
from training.codec.config import CodecConfig
from training.codec.train import (
    CHECKPOINT_NAME,
    in_two_parts,
    measure,
    psnr_db,
    train_codec,
)

TINY = CodecConfig(
    z_dim=4, encoder_width=4, decoder_width=4, image_steps=3, steps=3, image_batch_size=2,
    clip_frames=(5, 9), frames_per_step=10, eval_clips=2, eval_frames=9,
)  # fmt: skip


def render(seed: int, num_frames: int) -> np.ndarray:
    return render_clip(random_scene(seed), num_frames, 8.0)


def test_a_seed_gives_the_same_codec_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_codec(TINY, render, tmp_path / name)
    assert VideoCodec.load(tmp_path / "a").digest == VideoCodec.load(tmp_path / "b").digest


def test_training_lowers_the_error_and_reports_every_step(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    config = TINY.model_copy(update={"image_steps": 60, "steps": 2})
    # The same few scenes again and again: dark and light ones start at very different errors.
    train_codec(config, lambda seed, n: render(seed % 4, n), tmp_path / "codec", seen.append)
    assert [m["step"] for m in seen] == list(range(1, 63))
    losses = [m["loss"] for m in seen[:60]]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


class Killed(Exception):
    """What stands for the end of the process."""


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path, precision: str) -> None:
    config = TINY.model_copy(update={"precision": precision, "checkpoint_every_steps": 2})

    def dies_at_step_5(measured: dict[str, float]) -> None:
        if measured["step"] == 5:
            raise Killed

    train_codec(config, render, tmp_path / "whole")
    with pytest.raises(Killed):
        train_codec(config, render, tmp_path / "killed", dies_at_step_5)
    steps: list[float] = []
    train_codec(config, render, tmp_path / "killed", lambda m: steps.append(m["step"]))
    assert steps == [5, 6]
    whole, killed = (VideoCodec.load(tmp_path / name) for name in ("whole", "killed"))
    assert whole.digest == killed.digest
    assert not (tmp_path / "killed" / CHECKPOINT_NAME).exists()


def test_what_other_settings_left_is_refused(tmp_path: Path) -> None:
    def dies(measured: dict[str, float]) -> None:
        if measured["step"] == 3:
            raise Killed

    config = TINY.model_copy(update={"checkpoint_every_steps": 1})
    with pytest.raises(Killed):
        train_codec(config, render, tmp_path, dies)
    with pytest.raises(FlowreelError, match="other settings"):
        train_codec(config.model_copy(update={"kl_weight": 0.5}), render, tmp_path)


def test_training_encodes_and_decodes_as_the_codec_does() -> None:
    vae = build_vae(TINY.vae_config())
    codec = VideoCodec(vae, digest="")
    frames = torch.as_tensor(render(3, 9))[None]
    signal = (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        moments = vae.quant_conv(in_two_parts(vae.encoder, patchify(signal, TINY.patch_size)))
        mean, logvar = (part.transpose(1, 2) for part in moments.chunk(2, dim=1))
        decoded = in_two_parts(vae.decoder, vae.post_quant_conv(moments[:, :4]), first_chunk=True)
        picture = unpatchify(decoded, TINY.patch_size).clamp(-1, 1)
    torch.testing.assert_close(mean, codec.encode(frames)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, codec.encode(frames)[1], atol=1e-5, rtol=1e-5)
    by_codec = codec.decode(codec.convention.to_model(mean)).float() / 127.5 - 1
    torch.testing.assert_close(picture.permute(0, 2, 3, 4, 1), by_codec, atol=1e-2, rtol=0)


def test_training_can_go_on_from_a_codec(tmp_path: Path) -> None:
    train_codec(TINY, render, tmp_path / "first")
    train_codec(TINY, render, tmp_path / "second", start=tmp_path / "first")
    first, second = (VideoCodec.load(tmp_path / name) for name in ("first", "second"))
    assert first.digest != second.digest
    assert first.latent_channels == second.latent_channels == TINY.z_dim


def test_the_saved_statistics_standardise_the_latents(tmp_path: Path) -> None:
    train_codec(TINY, render, tmp_path)
    codec = VideoCodec.load(tmp_path)
    frames = torch.stack([torch.as_tensor(render(i, 9)) for i in range(16)])
    x = codec.convention.to_model(codec.encode(frames)[0])
    assert abs(float(x.mean())) < 0.5
    assert 0.5 < float(x.std()) < 2


def test_psnr_is_what_its_definition_says() -> None:
    black = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    assert psnr_db(black + 255, black) == 0
    assert psnr_db(black + 1, black) == pytest.approx(48.13, abs=0.01)


def test_the_codec_that_ships_is_small_and_as_good_as_it_says() -> None:
    weights = SHAPES_CODEC / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 5_000_000
    stated = json.loads((SHAPES_CODEC / "quality.json").read_text())["psnr_db"]

    def clip(seed: int, num_frames: int) -> np.ndarray:
        return render_clip(random_scene(seed), num_frames, (8.0, 16.0)[seed % 2])

    measured = measure(VideoCodec.load(SHAPES_CODEC), clip, 32, 33)["psnr_db"]
    assert measured >= 29.5
    assert measured == pytest.approx(stated, abs=0.05)


def test_shapes_are_still_shapes_after_the_codec_that_ships() -> None:
    codec = VideoCodec.load(SHAPES_CODEC)
    asked = prompts(24, seed=77, split="any")
    real = torch.stack([torch.as_tensor(render_clip(p.scene, 33, 16.0)) for p in asked])
    back = torch.cat(
        [codec.decode(codec.convention.to_model(codec.encode(part)[0])) for part in real.split(4)]
    )
    right = [judge(clip.numpy()).shape == p.shape for clip, p in zip(back, asked, strict=True)]
    assert np.mean(right) >= 0.95, f"{np.mean(right):.0%} of the shapes are read back"
