"""The codec's laws on a tiny random network: streaming equals whole, conventions invert, wrong input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flow.codec import (
    CodecError,
    LatentConvention,
    VideoCodec,
    build_vae,
    latent_frames,
    save_codec,
    video_frames,
)
from training.codec import CodecConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("codec")
    config = CodecConfig(z_dim=4, encoder_width=4, decoder_width=4).vae_config()
    config |= {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.5, 1.0, 2.0, 1.5]}
    save_codec(build_vae(config), out, half=False)
    return out


@pytest.fixture(scope="module")
def codec(folder: Path) -> VideoCodec:
    return VideoCodec.load(folder)


def frames(batch: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (batch, count, 32, 48, 3), generator=generator, dtype=torch.uint8)


def test_shapes_are_a_sixteenth_in_space_and_a_quarter_in_time(codec: VideoCodec) -> None:
    mean, logvar = codec.encode(frames(2, 9))
    assert mean.shape == logvar.shape == (2, 3, 4, 2, 3)
    assert codec.decode(mean).shape == (2, 9, 32, 48, 3)


def test_streaming_decode_equals_the_librarys_whole_decode_bit_for_bit(codec: VideoCodec) -> None:
    mean, logvar = codec.encode(frames(1, 9))
    x = codec.convention.to_model(mean, logvar)
    stream = codec.stream()
    pieces = [stream.push(frame) for frame in x.unbind(1)]
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4]
    signal = codec.vae.decode(codec.convention.from_model(x).transpose(1, 2)).sample
    whole = ((signal.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_two_streams_share_a_codec_without_meeting(codec: VideoCodec) -> None:
    a, b = torch.randn(1, 2, 4, 2, 3), torch.randn(1, 2, 4, 2, 3)
    first, second = codec.stream(), codec.stream()
    mixed = [first.push(a[:, 0]), second.push(b[:, 0]), first.push(a[:, 1]), second.push(b[:, 1])]
    assert torch.equal(torch.cat([mixed[0], mixed[2]], 1), codec.decode(a))
    assert torch.equal(torch.cat([mixed[1], mixed[3]], 1), codec.decode(b))


def test_encoding_is_causal_no_latent_depends_on_later_frames(codec: VideoCodec) -> None:
    clip = frames(1, 9)
    changed = clip.clone()
    changed[:, 5:] = 255 - changed[:, 5:]
    mean, changed_mean = codec.encode(clip)[0], codec.encode(changed)[0]
    assert torch.equal(mean[:, :2], changed_mean[:, :2])
    assert not torch.equal(mean[:, 2], changed_mean[:, 2])


@pytest.mark.parametrize("count", [2, 3, 4, 6, 80])
def test_frame_counts_other_than_4k_plus_1_are_refused(codec: VideoCodec, count: int) -> None:
    with pytest.raises(CodecError, match=r"4k\+1"):
        codec.encode(torch.zeros(1, count, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(CodecError):
        latent_frames(count)


@pytest.mark.parametrize("count", [1, 5, 17, 81])
def test_frame_arithmetic_inverts(count: int) -> None:
    assert video_frames(latent_frames(count)) == count


def test_sizes_and_types_the_codec_cannot_take_are_refused(codec: VideoCodec) -> None:
    with pytest.raises(CodecError, match="multiples of 16"):
        codec.encode(torch.zeros(1, 1, 40, 32, 3, dtype=torch.uint8))
    with pytest.raises(CodecError, match="uint8"):
        codec.encode(torch.zeros(1, 1, 32, 32, 3))


@pytest.mark.parametrize("posterior_noise", [False, True])
def test_latent_convention_inverts_in_float64(posterior_noise: bool) -> None:
    convention = LatentConvention((0.5, -1.0), (2.0, 0.25), 0.6, posterior_noise)
    mean = torch.randn(1, 3, 2, 4, 4, dtype=torch.float64)
    logvar = torch.full_like(mean, -40.0)
    x = convention.to_model(mean, logvar, torch.randn_like(mean))
    torch.testing.assert_close(convention.from_model(x), mean, atol=1e-7, rtol=0)
    # Frames after the first, alone, as in the later windows of a long video.
    torch.testing.assert_close(
        convention.from_model(x[:, 1:], first_frame=False), mean[:, 1:], atol=1e-7, rtol=0
    )
    assert LatentConvention.from_dict(json.loads(json.dumps(convention.to_dict()))) == convention


def test_released_convention_does_not_divide_posterior_noise_by_std() -> None:
    convention = LatentConvention((0.0,), (4.0,), 0.6, posterior_noise=True)
    mean, logvar = torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1)
    x = convention.to_model(mean, logvar, torch.ones(1, 2, 1, 1, 1))
    torch.testing.assert_close(x.flatten(), torch.tensor([1.0, 0.6]))
    with pytest.raises(CodecError, match="samples the posterior"):
        convention.to_model(mean)


def test_digest_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    assert VideoCodec.load(folder).digest == VideoCodec.load(folder).digest
    torch.manual_seed(1)
    save_codec(build_vae(json.loads((folder / "config.json").read_text())), tmp_path, half=False)
    assert VideoCodec.load(tmp_path).digest != VideoCodec.load(folder).digest


def test_unknown_codecs_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CodecError, match="unknown codec 'nonsense'"):
        VideoCodec.load("nonsense")
    with pytest.raises(CodecError, match=r"config\.json"):
        VideoCodec.load(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(CodecError, match="AutoencoderTiny"):
        VideoCodec.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"z_dim": 8}))
    with pytest.raises(CodecError, match="do not fit"):
        VideoCodec.load(tmp_path)
