"""The frozen codec: a causal video VAE between RGB frames and the latents that the flow models.

The network is diffusers' `AutoencoderKLWan` (imported only when a codec is loaded), at any size: the 704.7M one of
Wan2.2 or the tiny one that ships here. This file adds what the library leaves open: refusing frame counts that it would
silently cut, a stream whose cache the caller owns, and the convention between codec latents and model latents.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# diffusers has no types of its own, and its attributes are not torch's.
Vae = Any


class CodecError(ValueError):
    """A codec that cannot be loaded, or frames that it cannot take."""


def latent_frames(num_frames: int, temporal_factor: int = 4) -> int:
    """Latent frames of a clip: 1 + (num_frames - 1) / 4; other counts than 4k+1 are refused.

    >>> latent_frames(81)
    21
    """
    if num_frames < 1 or (num_frames - 1) % temporal_factor:
        near = max(0, (num_frames - 1)) // temporal_factor * temporal_factor + 1
        raise CodecError(
            f"{num_frames} frames: the codec takes {temporal_factor}k+1 of them; "
            f"the nearest counts are {near} and {near + temporal_factor}"
        )
    return 1 + (num_frames - 1) // temporal_factor


def video_frames(num_latent_frames: int, temporal_factor: int = 4) -> int:
    """Frames that so many latent frames decode to."""
    return 1 + (num_latent_frames - 1) * temporal_factor


@dataclass(frozen=True)
class LatentConvention:
    """How codec moments become the latents the flow models, and back.

    `x = ((mean − m)/s + posterior_noise·exp(½ logvar)·ε) · scale_f`, scale 1 for the first frame and
    `later_frame_scale` after it. The released models use posterior noise (not divided by s) and 0.6; models that we train use
    the plain standardised mean.

    Attributes:
        mean, std: m and s per channel, in codec units.
        later_frame_scale: factor on latent frames after the first.
        posterior_noise: whether the posterior is sampled.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    later_frame_scale: float = 1.0
    posterior_noise: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise CodecError(
                f"latent statistics need as many means as stds, all stds positive; got {len(self.mean)} means, stds {self.std}"
            )

    def _frame_scale(self, x_BTCHW: Tensor, first_frame: bool) -> Tensor:
        scale = torch.full((x_BTCHW.shape[1],), self.later_frame_scale, dtype=x_BTCHW.dtype)
        if first_frame:
            scale[0] = 1.0
        return rearrange(scale, "t -> t 1 1 1").to(x_BTCHW.device)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device)
        std = torch.tensor(self.std, dtype=like.dtype, device=like.device)
        return rearrange(mean, "c -> c 1 1"), rearrange(std, "c -> c 1 1")

    def to_model(
        self,
        mean_BTCHW: Tensor,
        logvar_BTCHW: Tensor | None = None,
        noise_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """Model latents [B, T, C, h, w] of codec moments; `noise_BTCHW` is standard normal, needed where the convention
        samples the posterior."""
        mean, std = self._statistics(mean_BTCHW)
        x_BTCHW = (mean_BTCHW - mean) / std
        if self.posterior_noise:
            if logvar_BTCHW is None or noise_BTCHW is None:
                raise CodecError(
                    "this latent convention samples the posterior: give log-variance and noise"
                )
            x_BTCHW = x_BTCHW + torch.exp(0.5 * logvar_BTCHW) * noise_BTCHW
        return x_BTCHW * self._frame_scale(x_BTCHW, first_frame=True)

    def from_model(self, x_BTCHW: Tensor, first_frame: bool = True) -> Tensor:
        """Codec latents [B, T, C, h, w] of model latents; `first_frame` says whether frame 0 here is the video's first."""
        mean, std = self._statistics(x_BTCHW)
        return x_BTCHW / self._frame_scale(x_BTCHW, first_frame) * std + mean

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentConvention:
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _to_signal(frames_BTHWC: Tensor) -> Tensor:
    return rearrange(frames_BTHWC.float() / 127.5 - 1, "b t h w c -> b c t h w")


def _to_frames(signal_BCTHW: Tensor) -> Tensor:
    scaled = (signal_BCTHW.clamp(-1, 1) + 1) * 127.5
    return rearrange(scaled.round().to(torch.uint8), "b c t h w -> b t h w c")


class VideoCodec:
    """A loaded codec.

    Example: `codec = VideoCodec.load("pipeline/assets/tiny_codec")`, then `mean, logvar = codec.encode(frames)`.
    """

    def __init__(self, vae: Vae, digest: str, convention: LatentConvention | None = None) -> None:
        config = vae.config
        self.vae = vae.eval().requires_grad_(False)
        self.digest = digest
        self.spatial_factor = int(config.scale_factor_spatial)
        self.temporal_factor = int(config.scale_factor_temporal)
        self.latent_channels = int(config.z_dim)
        self.convention = convention or LatentConvention(
            tuple(config.latents_mean), tuple(config.latents_std)
        )

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> VideoCodec:
        """From a folder with `config.json` and safetensors, or a hub id such as `Wan-AI/Wan2.2-TI2V-5B-Diffusers`.

        Raises:
            CodecError: nothing there, or it is no AutoencoderKLWan, or its weights do not fit its config.
        """
        folder = Path(source)
        if not folder.is_dir():
            return cls._from_hub(str(source), device)
        if not (folder / CONFIG_NAME).is_file() and (folder / "vae" / CONFIG_NAME).is_file():
            folder = folder / "vae"
        if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
            raise CodecError(f"no codec in {folder}: it needs {CONFIG_NAME} and {WEIGHTS_NAME}")
        from safetensors.torch import load_file

        config_bytes = (folder / CONFIG_NAME).read_bytes()
        vae = build_vae(json.loads(config_bytes))
        weights = {k: v.float() for k, v in load_file(folder / WEIGHTS_NAME).items()}
        try:
            vae.load_state_dict(weights)
        except RuntimeError as error:
            raise CodecError(f"the weights in {folder} do not fit its config: {error}") from error
        digest = hashlib.sha256(config_bytes)
        with (folder / WEIGHTS_NAME).open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
        return cls(vae.to(device), digest.hexdigest()[:16])

    @classmethod
    def _from_hub(cls, name: str, device: str | torch.device) -> VideoCodec:
        if not HUB_ID.fullmatch(name):
            raise CodecError(f"unknown codec {name!r}: neither a folder nor a hub id (owner/name)")
        from diffusers import AutoencoderKLWan

        try:
            vae = AutoencoderKLWan.from_pretrained(name, subfolder="vae", torch_dtype=torch.float32)
        except OSError as error:
            raise CodecError(
                f"unknown codec {name!r}: no such folder, and no hub gave it ({str(error).splitlines()[0]})"
            ) from error
        digest = hashlib.sha256()
        for key, value in sorted(vae.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().data)
        return cls(vae.to(device), digest.hexdigest()[:16])

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def _check_frames(self, frames_BTHWC: Tensor) -> None:
        if (
            frames_BTHWC.dtype != torch.uint8
            or frames_BTHWC.ndim != 5
            or frames_BTHWC.shape[-1] != 3
        ):
            raise CodecError(
                f"frames must be uint8 [B, T, H, W, 3], got {frames_BTHWC.dtype} {list(frames_BTHWC.shape)}"
            )
        latent_frames(frames_BTHWC.shape[1], self.temporal_factor)
        height, width = frames_BTHWC.shape[2:4]
        if height % self.spatial_factor or width % self.spatial_factor:
            raise CodecError(
                f"frames of {height}x{width}: both sides must be multiples of {self.spatial_factor}"
            )

    @torch.inference_mode()
    def encode(self, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior moments, in codec units.

        Args:
            frames_BTHWC: uint8 [B, 4k+1, H, W, 3].

        Returns:
            mean and log-variance, fp32 [B, k+1, C, H/16, W/16].
        """
        self._check_frames(frames_BTHWC)
        posterior = self.vae.encode(_to_signal(frames_BTHWC.to(self.device))).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return rearrange(mean, "b c t h w -> b t c h w"), rearrange(
            logvar, "b c t h w -> b t c h w"
        )

    def decode(self, x_BTCHW: Tensor) -> Tensor:
        """uint8 frames [B, 4T-3, H, W, 3] of model latents; the stream run to its end."""
        stream = self.stream()
        return torch.cat([stream.push(x_BCHW) for x_BCHW in x_BTCHW.unbind(1)], dim=1)

    def stream(self) -> CodecStream:
        """A decoder that takes one latent frame at a time."""
        return CodecStream(self)


class CodecStream:
    """Decodes latent frames one by one; equal, bit for bit, to decoding them together.

    All causal state is in this object, none in the codec's module, so many streams may share one codec.
    """

    def __init__(self, codec: VideoCodec) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

        self._codec = codec
        self._unpatchify = unpatchify
        convolutions = sum(isinstance(m, WanCausalConv3d) for m in codec.vae.decoder.modules())
        self._cache: list[Any] = [None] * convolutions
        self._first = True

    @torch.inference_mode()
    def push(self, x_BCHW: Tensor) -> Tensor:
        """uint8 frames [B, 1 (first) or 4, H, W, 3] of the next model latent frame [B, C, h, w]."""
        vae = self._codec.vae
        codec_latent = self._codec.convention.from_model(x_BCHW[:, None].float(), self._first)
        signal = vae.post_quant_conv(
            rearrange(codec_latent, "b t c h w -> b c t h w").to(self._codec.device)
        )
        # `first_chunk` reaches the residual shortcuts only when given by name, as the library does.
        out = vae.decoder(signal, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first)
        if vae.config.patch_size is not None:
            out = self._unpatchify(out, patch_size=vae.config.patch_size)
        self._first = False
        return _to_frames(out.float())


def build_vae(config: dict[str, Any]) -> Vae:
    """An `AutoencoderKLWan` with random weights from its config.

    Raises:
        CodecError: the config is of another class, or has values the class refuses.
    """
    from diffusers import AutoencoderKLWan

    name = config.get("_class_name", "AutoencoderKLWan")
    if name != "AutoencoderKLWan":
        raise CodecError(f"unknown codec class {name!r}; allowed: AutoencoderKLWan")
    values = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        return AutoencoderKLWan(**values)
    except (TypeError, ValueError) as error:
        raise CodecError(f"the codec's config does not fit AutoencoderKLWan: {error}") from error


def save_codec(vae: Vae, out: Path, *, half: bool = True) -> None:
    """Write `config.json` and safetensors (fp16 where `half`) to the folder `out`."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    config["_class_name"] = "AutoencoderKLWan"
    dtype = torch.float16 if half else torch.float32
    weights = {k: v.detach().to(dtype).contiguous().cpu() for k, v in vae.state_dict().items()}
    save_file(weights, out / WEIGHTS_NAME)
    (out / CONFIG_NAME).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
