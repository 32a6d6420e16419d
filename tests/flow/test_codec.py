"""The codec's laws on tiny random networks.

Streaming equals whole, conventions invert, and wrong input is refused.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flow.codec import (
    CodecError,
    ImageCodec,
    LatentConvention,
    VideoCodec,
    build_vae,
    save_codec,
)
from flow.codec_factors import WAN_FACTORS
from flow.codec_layers import ChannelNorm
from tests.tiny_codec import wan_like
from training.codec.train import CodecConfig

WAN = wan_like(4)
STATISTICS = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.5, 1.0, 2.0, 1.5]}
# Of the form that ships here: patches of 4, two halvings.
SHIPPED = CodecConfig(patch_size=4, z_dim=4, encoder_width=4, decoder_width=4).vae_config()
# As the SD VAE, but narrow: three halvings, 4 channels, an attention in the middle.
SD = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}


def made(config: dict[str, Any], out: Path) -> Path:
    """A codec folder with random weights, none of them zero."""
    torch.manual_seed(0)
    vae = build_vae(config)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    save_codec(vae, out, half=False)
    return out


@pytest.fixture(scope="module", params=["wan", "shipped"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = (WAN if request.param == "wan" else SHIPPED) | STATISTICS
    return made(config, tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def codec(folder: Path) -> VideoCodec:
    return VideoCodec.load(folder)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(SD, tmp_path_factory.mktemp("sd"))


def frames(batch: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (batch, count, 32, 48, 3), generator=generator, dtype=torch.uint8)


def test_wan22s_own_size_has_the_published_number_of_parameters() -> None:
    published = WAN | {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48}
    published |= {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    with torch.device("meta"):
        vae = build_vae(published)
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 704.7


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


def _state(module: torch.nn.Module) -> list[tuple[str, str]]:
    """Everything that hangs on a module and its parts besides weights, as text."""
    return [
        (f"{name}.{key}", repr(value))
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if not key.startswith(("_parameters", "_buffers", "_modules"))
    ]


def test_neither_encoding_nor_a_stream_leaves_state_in_the_module(codec: VideoCodec) -> None:
    before = _state(codec.vae)
    mean, _ = codec.encode(frames(1, 5))
    stream = codec.stream()
    for x in mean.unbind(1):
        stream.push(x)
        assert _state(codec.vae) == before


def test_encoding_equals_the_librarys_bit_for_bit(codec: VideoCodec) -> None:
    clip = frames(2, 13)
    mean, logvar = codec.encode(clip)
    with torch.no_grad():
        signal = (clip.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
        posterior = codec.vae.encode(signal).latent_dist
    assert torch.equal(mean, posterior.mean.transpose(1, 2))
    assert torch.equal(logvar, posterior.logvar.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_our_norm_is_the_librarys_but_for_rounding(dtype: torch.dtype) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    theirs = WanRMS_norm(6, images=False)
    torch.nn.init.normal_(theirs.gamma)
    ours = ChannelNorm(theirs.gamma, theirs.bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :, 0, 0, 0] = 0
    error = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours(x).double(), theirs(x).double(), atol=error, rtol=error)


def test_a_loaded_codec_has_none_of_the_librarys_norms(codec: VideoCodec) -> None:
    kinds = {type(module).__name__ for module in codec.vae.modules()}
    assert "ChannelNorm" in kinds
    assert "WanRMS_norm" not in kinds


def test_threads_may_encode_with_one_codec(codec: VideoCodec) -> None:
    clips = [frames(1, count) for count in (5, 9, 13, 5, 9, 13)]
    alone = [codec.encode(clip)[0] for clip in clips]
    with ThreadPoolExecutor(3) as pool:
        together = [moments[0] for moments in pool.map(codec.encode, clips)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


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
        WAN_FACTORS.latent_frames(count)


@pytest.mark.parametrize("count", [1, 5, 17, 81])
def test_frame_arithmetic_inverts(count: int) -> None:
    assert WAN_FACTORS.video_frames(WAN_FACTORS.latent_frames(count)) == count


def test_sizes_and_types_the_codec_cannot_take_are_refused(codec: VideoCodec) -> None:
    with pytest.raises(CodecError, match="multiple of 16"):
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


def test_diffusers_convention_is_a_standardised_posterior_sample(codec: VideoCodec) -> None:
    convention = LatentConvention.diffusers().with_statistics_of(codec.convention)
    assert convention.mean == tuple(STATISTICS["latents_mean"])
    clip = frames(1, 5)
    mean, logvar = codec.encode(clip)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    x = convention.to_model(mean, logvar, noise)
    sample = mean + torch.exp(0.5 * logvar) * noise
    m, s = (torch.tensor(v).view(1, 1, -1, 1, 1) for v in (convention.mean, convention.std))
    torch.testing.assert_close(x, (sample - m) / s)
    # The released one: the same mean, noise as it comes, later frames scaled.
    released = LatentConvention.released().with_statistics_of(codec.convention)
    expected = (mean - m) / s + torch.exp(0.5 * logvar) * noise
    expected[:, 1:] *= 0.6
    torch.testing.assert_close(released.to_model(mean, logvar, noise), expected)
    for each in (convention, released):
        # Both are undone alike: what the flow makes is taken as the posterior's mean.
        undone = each.from_model(each.to_model(mean, logvar, torch.zeros_like(mean)))
        torch.testing.assert_close(undone, mean, atol=1e-5, rtol=1e-5)


def test_latents_without_their_statistics_are_refused() -> None:
    with pytest.raises(CodecError, match="with_statistics_of"):
        LatentConvention.released().from_model(torch.zeros(1, 1, 4, 2, 2))
    own = LatentConvention((1.0,), (2.0,))
    assert own.with_statistics_of(LatentConvention((5.0,), (6.0,))) is own


def test_image_codec_takes_one_frame_at_an_eighth_with_its_scaling(image_folder: Path) -> None:
    codec = VideoCodec.load(image_folder)
    assert isinstance(codec, ImageCodec)
    assert (codec.factors.space, codec.latent_channels) == (8, 4)
    picture = frames(2, 1)
    mean, logvar = codec.encode(picture)
    assert mean.shape == logvar.shape == (2, 1, 4, 4, 6)
    with torch.no_grad():
        signal = (picture[:, 0].float() / 127.5 - 1).permute(0, 3, 1, 2)
        posterior = codec.vae.encode(signal).latent_dist
    assert torch.equal(mean[:, 0], posterior.mean)
    assert torch.equal(logvar[:, 0], posterior.logvar)
    x = codec.convention.to_model(mean)
    torch.testing.assert_close(x, mean * 0.18215)
    with torch.no_grad():
        decoded = codec.vae.decode(x[:, 0] / 0.18215).sample
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    got = codec.decode(x)
    assert got.shape == (2, 1, 32, 48, 3)
    # Dividing by the scaling and multiplying by its inverse round differently.
    assert (got[:, 0].float() - expected).abs().max() <= 1
    with pytest.raises(CodecError, match="for images and takes 1"):
        codec.encode(frames(1, 5))
    with pytest.raises(CodecError, match="multiple of 8"):
        codec.encode(torch.zeros(1, 1, 12, 32, 3, dtype=torch.uint8))


def test_first_names_of_the_sd_vaes_attention_are_understood(
    image_folder: Path, tmp_path: Path
) -> None:
    weights = load_file(image_folder / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(weights)
    for name in weights:
        for new, first in old.items():
            if f".attentions.0.{new}." in name:
                renamed[name.replace(f".{new}.", f".{first}.")] = renamed.pop(name)
    assert sum("proj_attn" in name for name in renamed) == 4
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((image_folder / "config.json").read_text())
    one, two = VideoCodec.load(image_folder), VideoCodec.load(tmp_path)
    picture = frames(1, 1)
    assert torch.equal(one.encode(picture)[0], two.encode(picture)[0])


@pytest.mark.parametrize("at", ["vae", "."])
def test_a_hub_id_gives_the_codec_that_its_folder_gives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    name = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CodecError, match="no hub gave it"):
        VideoCodec.load(name)
    # The hub's own cache layout, as a download leaves it.
    repository = tmp_path / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123abc"
    (snapshot / at).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    for path in folder.iterdir():
        (snapshot / at / path.name).write_bytes(path.read_bytes())
    fetched, own = VideoCodec.load(name), VideoCodec.load(folder)
    assert fetched.digest == own.digest
    assert torch.equal(fetched.encode(frames(1, 1))[0], own.encode(frames(1, 1))[0])
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    for path in folder.iterdir():
        (pipeline / "vae" / path.name).write_bytes(path.read_bytes())
    assert VideoCodec.load(pipeline).digest == own.digest


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
