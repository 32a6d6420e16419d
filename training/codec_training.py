"""Train a small codec on procedural video: `flowreel train-codec`.

Writes a folder that `flow.codec.VideoCodec` loads, with the latent statistics in its config and the
PSNR on held-out scenes in `quality.json`. Knows nothing of flows, of latent shards or of Ray.

Shapes: B batch, T frames, H, W rows and columns in pixels, C colours or channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flow.codec import Vae, VideoCodec, build_vae, save_codec
from flowreel.files import write_json
from training.codec_config import CodecConfig

Render = Callable[[int, int], Any]
"""`render(seed, num_frames)` gives a scene's frames, uint8 [T, H, W, 3]."""
CodecProgress = Callable[[dict[str, float]], None]
"""Takes what a step measured: step, steps, loss, psnr_db."""
HELD_OUT_SEED = 900_000_000
"""Seed of the first held-out scene; training never gets so far."""


def _recolour(signal_CTHW: Tensor, generator: torch.Generator) -> Tensor:
    """A random linear mix of the colour axes.

    Without it the codec is blind to colours outside the world's palette.
    """
    matrix = torch.eye(3) * 0.4 + torch.rand(3, 3, generator=generator) * 0.6
    matrix = matrix / matrix.sum(1, keepdim=True)
    return torch.einsum("dc,cthw->dthw", matrix, signal_CTHW)


def _batches(config: CodecConfig, render: Render) -> Iterator[Tensor]:
    """Signals in -1..1, [B, 3, T, H, W]; batch n is a function of (seed, n).

    Single frames come first: they teach what shapes and colours are at a ninth of a clip's cost.
    """
    seed = 0
    for step in range(config.image_steps + config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        if step < config.image_steps:
            length, count = 1, config.image_batch_size
        else:
            length = config.clip_frames[step % len(config.clip_frames)]
            count = max(1, config.frames_per_step // length)
        clips = []
        for _ in range(count):
            frames = torch.as_tensor(render(seed, length))
            seed += 1
            signal = rearrange(frames.float() / 127.5 - 1, "t h w c -> c t h w")
            if torch.rand((), generator=generator) < config.recolour:
                signal = _recolour(signal, generator)
            clips.append(signal)
        yield torch.stack(clips)


def _schedule(config: CodecConfig, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 2%."""
    warmth = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = step / (config.image_steps + config.steps)
    return warmth * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class _Optimizers:
    """Muon (orthogonalised momentum) for the inner convolutions, AdamW for all else.

    torch's Muon takes matrices, so each kernel is handed to it as a [out, in·kernel] view of the
    same memory.
    """

    def __init__(self, vae: Vae, config: CodecConfig) -> None:
        outer = ("conv_in", "conv_out", "quant_conv")
        kernels = [
            weight
            for name, weight in vae.named_parameters()
            if weight.ndim >= 4 and weight[0].numel() > 1 and not any(o in name for o in outer)
        ]
        inner = {id(weight) for weight in kernels}
        self._kernels = kernels
        self._matrices = [nn.Parameter(weight.data.view(weight.shape[0], -1)) for weight in kernels]
        others = [weight for weight in vae.parameters() if id(weight) not in inner]
        muon = torch.optim.Muon(self._matrices, lr=config.muon_learning_rate, weight_decay=0.0)
        adam = torch.optim.AdamW(
            others, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self._peaks = ((muon, config.muon_learning_rate), (adam, config.learning_rate))

    def step(self, share: float) -> None:
        """One update at this share of the peak learning rates."""
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view_as(matrix)
        for optimizer, peak in self._peaks:
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()


def _quiet_posterior(vae: Vae, logvar: float = -5.0) -> None:
    """Start with little posterior noise: e^0 would drown what an untrained encoder says."""
    bias = vae.quant_conv.bias
    with torch.no_grad():
        bias[bias.shape[0] // 2 :] = logvar


def _initial(config: CodecConfig, start: Path | None) -> Vae:
    """A fresh network, or a trained one whose training goes on."""
    if start is not None:
        return VideoCodec.load(start).vae.requires_grad_(True)
    vae = build_vae(config.vae_config())
    _quiet_posterior(vae)
    return vae


def _losses(vae: Vae, signal_BCTHW: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Loss and mean squared error, both on the -1..1 scale."""
    posterior = vae.encode(signal_BCTHW).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample
    mse = torch.mean((reconstruction - signal_BCTHW) ** 2)
    kl = 0.5 * torch.mean(posterior.mean**2 + posterior.var - 1 - posterior.logvar)
    return mse + kl_weight * kl, mse


def psnr_db(frames: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 frames, over all of them together."""
    mse = torch.mean((frames.double() - reference.double()) ** 2).item()
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def measure(codec: VideoCodec, render: Render, num_clips: int, num_frames: int) -> dict[str, float]:
    """PSNR in dB of encode-then-decode (posterior mean) on held-out scenes.

    `psnr_db` is over whole clips, `first_frame_psnr_db` over their first frames alone.
    """
    frames_BTHWC = torch.stack(
        [torch.as_tensor(render(HELD_OUT_SEED + i, num_frames)) for i in range(num_clips)]
    )
    clips = []
    for part_BTHWC in frames_BTHWC.split(4):
        mean, logvar = codec.encode(part_BTHWC)
        noise = torch.zeros_like(mean)
        clips.append(codec.decode(codec.convention.to_model(mean, logvar, noise)))
    out_BTHWC = torch.cat(clips)
    return {
        "psnr_db": psnr_db(out_BTHWC, frames_BTHWC),
        "first_frame_psnr_db": psnr_db(out_BTHWC[:, :1], frames_BTHWC[:, :1]),
    }


def _set_statistics(vae: Vae, config: CodecConfig, render: Render) -> None:
    """Write the latents' mean and standard deviation per channel into the codec's config."""
    codec = VideoCodec(vae, digest="")
    means = []
    for start in range(0, 128, 8):
        clips = [torch.as_tensor(render(start + i, config.eval_frames)) for i in range(8)]
        means.append(codec.encode(torch.stack(clips))[0])
    latents = rearrange(torch.cat(means), "b t c h w -> c (b t h w)")
    # Rounded so that the config reads well; the convention is whatever the config says.
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean(1).tolist()],
        latents_std=[round(v, 5) for v in latents.std(1).clamp_min(1e-4).tolist()],
    )


def train_codec(
    config: CodecConfig,
    render: Render,
    out: Path,
    progress: CodecProgress | None = None,
    *,
    start: Path | None = None,
) -> dict[str, float]:
    """Train, save to `out`, and measure what was saved.

    Args:
        config: size and schedule.
        render: `(seed, num_frames) -> uint8 [T, H, W, 3]`.
        out: folder for `config.json`, safetensors (fp16) and `quality.json`.
        progress: called after each step with step, steps, loss, psnr_db.
        start: folder of a codec whose training goes on; its size stays, `config`'s is not read.

    Returns:
        What `quality.json` holds: `psnr_db`, `first_frame_psnr_db`, `steps`, `seconds`.
    """
    torch.manual_seed(config.seed)
    vae = _initial(config, start).train()
    optimizers = _Optimizers(vae, config)
    average = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    started = time.monotonic()
    total = config.image_steps + config.steps
    for step, signal_BCTHW in enumerate(_batches(config, render)):
        loss, mse = _losses(vae, signal_BCTHW, config.kl_weight)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0, error_if_nonfinite=True)
        optimizers.step(_schedule(config, step))
        average.update_parameters(vae)
        if progress is not None:
            psnr = 10 * math.log10(4 / max(mse.item(), 1e-12))
            progress({"step": step + 1, "steps": total, "loss": loss.item(), "psnr_db": psnr})
    averaged_vae: Vae = average.module.eval()
    _set_statistics(averaged_vae, config, render)
    save_codec(averaged_vae, out)
    quality = measure(VideoCodec.load(out), render, config.eval_clips, config.eval_frames)
    quality |= {"steps": total, "seconds": round(time.monotonic() - started, 1)}
    write_json(out / "quality.json", quality)
    return quality
