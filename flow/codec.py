"""The frozen codec: a VAE between RGB frames and the latents that the flow models.

The networks are diffusers' (imported only when a codec is loaded), of any size: for video the
causal `AutoencoderKLWan` (the one of Wan2.2 with 704.7M parameters, or the tiny one that ships
here), for images `AutoencoderKL` (the SD VAE). This file adds what the library leaves open: it
refuses frame counts that the library would silently cut, lets the caller own the causal caches,
gives the same files one digest wherever they come from, and knows the convention between codec and
model latents.

Knows nothing of flows, texts or training. Errors: `flow.codec_factors.CodecError`.

Shapes: B batch, T frames, C channels (3 of a frame: RGB), H, W pixels, h, w latent cells.
"""

from __future__ import annotations

import hashlib
import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flow.codec_factors import (
    CONFIG_NAME,
    HUB_ID,
    IMAGE_CLASS,
    CodecError,
    factors_of,
)
from flow.codec_layers import quicken
from flow.latent_convention import LatentConvention
from flowreel.files import replacing, write_json

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
VIDEO_CLASS = "AutoencoderKLWan"

# diffusers has no types of its own, and its attributes are not torch's.
Vae = Any


def _to_signal(frames_BTHWC: Tensor) -> Tensor:
    return rearrange(frames_BTHWC.float() / 127.5 - 1, "b t h w c -> b c t h w")


def _to_frames(signal_BCTHW: Tensor) -> Tensor:
    scaled = (signal_BCTHW.clamp(-1, 1) + 1) * 127.5
    return rearrange(scaled.round().to(torch.uint8), "b c t h w -> b t h w c")


class VideoCodec:
    """A loaded codec for video; `ImageCodec` is its counterpart for single images.

    Source: `docs/design.md`, "The model exactly", codec facts.

    >>> codec = VideoCodec.load("pipeline/assets/tiny_codec")
    >>> frames = torch.zeros(1, 5, 32, 48, 3, dtype=torch.uint8)  # [B, T, H, W, 3]
    >>> mean, logvar = codec.encode(frames)
    >>> mean.shape  # [B, T, C, h, w]
    torch.Size([1, 2, 24, 2, 3])
    >>> codec.decode(codec.convention.to_model(mean)).shape
    torch.Size([1, 5, 32, 48, 3])
    """

    def __init__(self, vae: Vae, digest: str) -> None:
        config = vae.config
        self.vae = vae.eval().requires_grad_(False)
        self.digest = digest
        """Digest of config and weights: equal files have equal ones, wherever they come from."""
        self.factors = factors_of(dict(config))
        """Pixels per latent cell and video frames per latent frame."""
        self.latent_channels = int(config.z_dim)
        self.convention = LatentConvention(tuple(config.latents_mean), tuple(config.latents_std))

    @staticmethod
    def load(source: str | Path, device: str | torch.device = "cpu") -> VideoCodec:
        """The codec of a folder or of a hub id, with its weights in fp32.

        What `config.json` calls its class decides whether it is an `ImageCodec`.

        Args:
            source: a folder that holds the codec, itself or in a folder `vae`, or a hub id such as
                `Wan-AI/Wan2.2-TI2V-5B-Diffusers`.
            device: where the weights go.

        Raises:
            CodecError: nothing is there, the class is no codec here, or the weights do not fit.
        """
        folder = codec_folder(source)
        from safetensors.torch import load_file

        config = json.loads((folder / CONFIG_NAME).read_bytes())
        with torch.device("meta"):
            vae = build_vae(config)
        stored = load_file(folder / WEIGHTS_NAME)
        # Copied even where they are fp32 already: `train-codec` may write over the file while its
        # codec lives.
        weights = {_current_name(k): v.to(torch.float32, copy=True) for k, v in stored.items()}
        try:
            vae.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise CodecError(f"the weights in {folder} do not fit its config: {error}") from error
        assert not any(tensor.is_meta for tensor in chain(vae.parameters(), vae.buffers()))
        kind = ImageCodec if config.get("_class_name") == IMAGE_CLASS else VideoCodec
        return kind(quicken(vae.to(device)), codec_digest(folder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vae.parameters()).device

    def _check_frames(self, frames_BTHWC: Tensor) -> None:
        if (
            frames_BTHWC.dtype != torch.uint8
            or frames_BTHWC.ndim != 5
            or frames_BTHWC.shape[-1] != 3
        ):
            raise CodecError(
                f"frames must be uint8 [B, T, H, W, 3], "
                f"got {frames_BTHWC.dtype} {list(frames_BTHWC.shape)}"
            )
        self.factors.latent_frames(frames_BTHWC.shape[1])
        self.factors.grid(*frames_BTHWC.shape[2:4])

    @torch.inference_mode()
    def encode(self, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, in codec units.

        Args:
            frames_BTHWC: uint8 [B, 4k+1, H, W, 3], values 0 to 255.

        Returns:
            mean and log-variance, fp32 [B, k+1, C, H/16, W/16] (4 and 16: see `factors`).

        Raises:
            CodecError: another type, or a frame count or size that the codec cannot take whole.
        """
        self._check_frames(frames_BTHWC)
        return self._moments(_to_signal(frames_BTHWC.to(self.device)))

    def _moments(self, signal_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """The moments, one frame first and then four by four (`factors.time`).

        The causal cache is here and not in the module, so that threads may share a codec.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        vae, step = self.vae, self.factors.time
        if vae.config.patch_size is not None:
            signal_BCTHW = patchify(signal_BCTHW, patch_size=vae.config.patch_size)
        cache, hidden = empty_cache(vae.encoder), []
        for end in range(1, signal_BCTHW.shape[2] + 1, step):
            chunk = signal_BCTHW[:, :, max(0, end - step) : end]
            hidden.append(vae.encoder(chunk, feat_cache=cache, feat_idx=[0]))
        return _split_moments(vae.quant_conv(torch.cat(hidden, dim=2)), "b c t h w -> b t c h w")

    def decode(self, x_BTCHW: Tensor) -> Tensor:
        """uint8 frames [B, 4T-3, H, W, 3] of model latents [B, T, C, h, w]: a whole `stream`."""
        stream = self.stream()
        return torch.cat([stream.push(x_BCHW) for x_BCHW in x_BTCHW.unbind(1)], dim=1)

    def stream(self) -> CodecStream:
        """A decoder that takes one latent frame at a time."""
        return CodecStream(self)


class CodecStream:
    """Decodes latent frames one by one; the result is, bit for bit, that of decoding all at once.

    All causal state is in this object, none in the codec's module, so many streams may share one
    codec.
    """

    def __init__(self, codec: VideoCodec) -> None:
        self._codec = codec
        self._cache = empty_cache(codec.vae.decoder)
        self._first = True

    @torch.inference_mode()
    def push(self, x_BCHW: Tensor) -> Tensor:
        """uint8 frames [B, 1 (first) or 4, H, W, 3] of the next model latent frame [B, C, h, w]."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae = self._codec.vae
        codec_latent = self._codec.convention.from_model(x_BCHW[:, None].float(), self._first)
        signal = vae.post_quant_conv(
            rearrange(codec_latent, "b t c h w -> b c t h w").to(self._codec.device)
        )
        # By name, as the library does: given by place, `first_chunk` misses the residual shortcuts.
        out = vae.decoder(signal, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first)
        if vae.config.patch_size is not None:
            out = unpatchify(out, patch_size=vae.config.patch_size)
        self._first = False
        return _to_frames(out.float())


class ImageCodec(VideoCodec):
    """A codec for single images: a video of one frame, without time.

    The SD VAE has 8 pixels to a cell and 4 channels.
    """

    def __init__(self, vae: Vae, digest: str) -> None:
        config = vae.config
        self.vae = vae.eval().requires_grad_(False)
        self.digest = digest
        self.factors = factors_of({**config, "_class_name": IMAGE_CLASS})
        self.latent_channels = int(config.latent_channels)
        shift, scale = config.shift_factor or 0.0, 1 / config.scaling_factor
        self.convention = LatentConvention(
            (shift,) * self.latent_channels, (scale,) * self.latent_channels
        )

    def _check_frames(self, frames_BTHWC: Tensor) -> None:
        super()._check_frames(frames_BTHWC)
        if frames_BTHWC.shape[1] != 1:
            raise CodecError(
                f"{frames_BTHWC.shape[1]} frames: this codec is for images and takes 1; "
                "encode videos with an AutoencoderKLWan"
            )

    def _moments(self, signal_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.vae.encoder(signal_BCTHW[:, :, 0])
        if self.vae.quant_conv is not None:
            hidden = self.vae.quant_conv(hidden)
        return _split_moments(hidden, "b c h w -> b 1 c h w")

    def stream(self) -> ImageStream:
        """A decoder that takes one latent frame at a time."""
        return ImageStream(self)


class ImageStream(CodecStream):
    """`CodecStream` of an image codec: it takes a frame, gives a frame and keeps no state."""

    def __init__(self, codec: ImageCodec) -> None:
        self._codec = codec

    @torch.inference_mode()
    def push(self, x_BCHW: Tensor) -> Tensor:
        """uint8 frames [B, 1, H, W, 3] of the model latent [B, C, h, w]."""
        vae = self._codec.vae
        latent = self._codec.convention.from_model(x_BCHW[:, None].float())[:, 0]
        latent = latent.to(self._codec.device)
        if vae.post_quant_conv is not None:
            latent = vae.post_quant_conv(latent)
        return _to_frames(vae.decoder(latent).float()[:, :, None])


def build_vae(config: dict[str, Any]) -> Vae:
    """The network of a codec's config, with random weights.

    A config that names no class is an `AutoencoderKLWan`'s.

    Raises:
        CodecError: the config is of another class, or has values the class refuses.
    """
    import diffusers

    name = config.get("_class_name", VIDEO_CLASS)
    if name not in (VIDEO_CLASS, IMAGE_CLASS):
        raise CodecError(f"unknown codec class {name!r}; allowed: {VIDEO_CLASS}, {IMAGE_CLASS}")
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        return getattr(diffusers, name)(**values)
    except (TypeError, ValueError) as error:
        raise CodecError(f"the codec's config does not fit {name}: {error}") from error


def codec_digest(folder: Path) -> str:
    """Digest of the config and weights in a folder, as datasets and models name their codec."""
    # One digest of both files: `flowreel.values.sha256_of` takes one.
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    with (folder / WEIGHTS_NAME).open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def codec_folder(source: str | Path) -> Path:
    """Where a codec's config and weights lie.

    Those of a hub id are fetched, or taken from the hub's local cache.

    Raises:
        CodecError: nothing is there.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    if not (folder / CONFIG_NAME).is_file() and (folder / "vae" / CONFIG_NAME).is_file():
        folder = folder / "vae"
    if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise CodecError(f"no codec in {folder}: it needs {CONFIG_NAME} and {WEIGHTS_NAME}")
    return folder


def _from_hub(name: str) -> Path:
    if not HUB_ID.fullmatch(name):
        raise CodecError(f"unknown codec {name!r}: neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = [prefix + file for prefix in ("", "vae/") for file in (CONFIG_NAME, WEIGHTS_NAME)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:
        raise CodecError(
            f"unknown codec {name!r}: no such folder, and no hub gave it "
            f"({str(error).splitlines()[0]})"
        ) from error


_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _current_name(name: str) -> str:
    """The name that the library reads: the SD VAE's published files use older ones for attention.

    >>> _current_name("encoder.mid_block.attentions.0.proj_attn.bias")
    'encoder.mid_block.attentions.0.to_out.0.bias'
    """
    return _OLD_ATTENTION.sub(lambda match: f"{match[1]}{_NEW_ATTENTION[match[2]]}.", name)


def empty_cache(network: nn.Module) -> list[Any]:
    """The causal state of a Wan encoder or decoder before its first frame.

    It has a place for each causal convolution.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None for module in network.modules() if isinstance(module, WanCausalConv3d)]


def _split_moments(moments: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """Mean and log-variance in fp32; the log-variance stays within the library's own bounds."""
    mean, logvar = (rearrange(half.float(), order) for half in moments.chunk(2, dim=1))
    return mean, logvar.clamp(-30.0, 20.0)


def save_codec(vae: Vae, out: Path, *, half: bool = True) -> None:
    """Write `config.json` and safetensors (fp16 where `half`) to a folder, each file whole."""
    from safetensors.torch import save_file

    config = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    config["_class_name"] = type(vae).__name__
    dtype = torch.float16 if half else torch.float32
    weights = {k: v.detach().to(dtype).contiguous().cpu() for k, v in vae.state_dict().items()}
    with replacing(out / WEIGHTS_NAME) as partial:
        save_file(weights, partial)
    write_json(out / CONFIG_NAME, config)
