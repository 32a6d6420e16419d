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

from flow.codec import Vae, VideoCodec, build_vae, empty_cache, save_codec
from flow.codec_layers import quicken
from flow.device import has_quick_bf16
from flowreel.errors import FlowreelError
from flowreel.files import replacing, write_json
from training.codec.config import CodecConfig

Render = Callable[[int, int], Any]
"""`render(seed, num_frames)` gives a scene's frames, uint8 [T, H, W, 3]."""
CodecProgress = Callable[[dict[str, float]], None]
"""Takes what a step measured: step, steps, loss, psnr_db."""
CHECKPOINT_NAME = "training.pt"
"""The state of an unfinished run, in the codec's folder."""
HELD_OUT_SEED = 900_000_000
"""Seed of the first held-out scene; training never gets so far."""


def _recolour(signal_CTHW: Tensor, generator: torch.Generator) -> Tensor:
    """A random linear mix of the colour axes.

    Without it the codec is blind to colours outside the world's palette.
    """
    matrix = torch.eye(3) * 0.4 + torch.rand(3, 3, generator=generator) * 0.6
    matrix = matrix / matrix.sum(1, keepdim=True)
    return torch.einsum("dc,cthw->dthw", matrix, signal_CTHW)


def _clips(config: CodecConfig, step: int) -> tuple[int, int]:
    """How many clips a step takes, and of how many frames.

    Single frames come first: they teach what shapes and colours are at a ninth of a clip's cost.
    """
    if step < config.image_steps:
        return config.image_batch_size, 1
    length = config.clip_frames[step % len(config.clip_frames)]
    return max(1, config.frames_per_step // length), length


def _batches(
    config: CodecConfig, render: Render, first: int = 0
) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Signals in -1..1, [B, 3, T, H, W], from a step on, and what its other draws come from.

    Step n is a function of (seed, n).
    """
    scene = sum(_clips(config, step)[0] for step in range(first))
    for step in range(first, config.image_steps + config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        count, length = _clips(config, step)
        clips = []
        for _ in range(count):
            frames = torch.as_tensor(render(scene, length))
            scene += 1
            signal = rearrange(frames.float() / 127.5 - 1, "t h w c -> c t h w")
            if torch.rand((), generator=generator) < config.recolour:
                signal = _recolour(signal, generator)
            clips.append(signal)
        yield torch.stack(clips), generator


def _schedule(config: CodecConfig, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 2%."""
    warmth = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = step / (config.image_steps + config.steps)
    return warmth * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _as_laid_out(kernel: Tensor, like: Tensor) -> Tensor:
    """A kernel with its axes in the order in which those of `like` lie in memory."""
    return kernel if like.is_contiguous() else kernel.movedim(1, -1)


class _Optimizers:
    """Muon (orthogonalised momentum) for the inner convolutions, AdamW for all else.

    torch's Muon takes matrices, so each kernel is handed to it as a [out, kernel·in] view of the
    same memory; the order of columns does not change a step.
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
        self._matrices = [
            nn.Parameter(_as_laid_out(weight.data, weight).view(len(weight), -1))
            for weight in kernels
        ]
        others = [weight for weight in vae.parameters() if id(weight) not in inner]
        muon = torch.optim.Muon(self._matrices, lr=config.muon_learning_rate, weight_decay=0.0)
        adam = torch.optim.AdamW(
            others, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self._peaks = ((muon, config.muon_learning_rate), (adam, config.learning_rate))

    def step(self, share: float) -> None:
        """One update at this share of the peak learning rates."""
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            gradient = kernel.grad
            matrix.grad = (
                None if gradient is None else _as_laid_out(gradient, kernel).reshape_as(matrix)
            )
        for optimizer, peak in self._peaks:
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each optimizer."""
        return [optimizer.state_dict() for optimizer, _peak in self._peaks]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take over what `state_dict` gave."""
        for (optimizer, _peak), state in zip(self._peaks, states, strict=True):
            optimizer.load_state_dict(state)


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


def in_two_parts(network: nn.Module, signal_BCTHW: Tensor, **first: bool) -> Tensor:
    """A Wan encoder or decoder over a clip: its first frame, then all others at once.

    The library goes four by four; the causal caches make both the same, and this one is quicker.
    """
    cache = empty_cache(network)
    parts = [network(signal_BCTHW[:, :, :1], feat_cache=cache, feat_idx=[0], **first)]
    if signal_BCTHW.shape[2] > 1:
        parts.append(network(signal_BCTHW[:, :, 1:], feat_cache=cache, feat_idx=[0]))
    return torch.cat(parts, dim=2)


def _losses(
    vae: Vae, signal_BCTHW: Tensor, config: CodecConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss and mean squared error, both on the -1..1 scale.

    Draws are made on the CPU, so that they are the same for every device.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

    device = signal_BCTHW.device
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with half:
        patches = patchify(signal_BCTHW, patch_size=config.patch_size)
        moments = vae.quant_conv(in_two_parts(vae.encoder, patches))
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    z = mean + torch.exp(0.5 * logvar) * normal(mean.shape)
    if config.latent_noise:
        spread = z.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        strength = config.latent_noise * torch.rand(len(z), 1, 1, 1, 1, generator=generator)
        z = z + strength.to(device) * spread * normal(z.shape)
    with half:
        decoded = in_two_parts(vae.decoder, vae.post_quant_conv(z), first_chunk=True)
        reconstruction = unpatchify(decoded, patch_size=config.patch_size)
    mse = torch.mean((reconstruction.float() - signal_BCTHW) ** 2)
    kl = 0.5 * torch.mean(mean**2 + logvar.exp() - 1 - logvar)
    return mse + config.kl_weight * kl, mse


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
        clips.append(codec.decode(codec.convention.to_model(mean, logvar, noise)).cpu())
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
    latents = rearrange(torch.cat(means), "b t c h w -> c (b t h w)").cpu()
    # Rounded so that the config reads well; the convention is whatever the config says.
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean(1).tolist()],
        latents_std=[round(v, 5) for v in latents.std(1).clamp_min(1e-4).tolist()],
    )


class _Run:
    """What a step changes, and the file from which a killed run goes on."""

    def __init__(
        self, config: CodecConfig, start: Path | None, path: Path, device: str = "cpu"
    ) -> None:
        torch.manual_seed(config.seed)
        self.vae = quicken(_initial(config, start).train().to(device))
        self.optimizers = _Optimizers(self.vae, config)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
        )
        self.step = 0
        self.seconds = 0.0
        self._path = path
        self._settings = config.model_dump_json(exclude={"checkpoint_every_steps"})
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        device = next(self.vae.parameters()).device
        state = torch.load(self._path, weights_only=True, map_location=device)
        if state["settings"] != self._settings:
            raise FlowreelError(
                f"{self._path} is of a training with other settings ({state['settings']}); give "
                "the same ones, remove that file, or choose another --out"
            )
        self.vae.load_state_dict(state["vae"])
        self.average.load_state_dict(state["average"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write all of it, whole or not at all."""
        state = {
            "settings": self._settings,
            "step": self.step,
            "seconds": self.seconds,
            "vae": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": self.optimizers.state_dict(),
        }
        with replacing(self._path) as partial:
            torch.save(state, partial)

    def end(self) -> None:
        """Forget the file: the codec is written."""
        self._path.unlink(missing_ok=True)


def train_codec(
    config: CodecConfig,
    render: Render,
    out: Path,
    progress: CodecProgress | None = None,
    *,
    start: Path | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Train, save to `out`, and measure what was saved.

    Args:
        config: size and schedule.
        render: `(seed, num_frames) -> uint8 [T, H, W, 3]`.
        out: folder for `config.json`, safetensors (fp16) and `quality.json`. A run that was killed
            left `training.pt` there, and goes on from it as if it had never stopped.
        progress: called after each step with step, steps, loss, psnr_db.
        start: folder of a codec whose training goes on; its size stays, `config`'s is not read.
        device: where it is computed, such as cpu or cuda.

    Returns:
        What `quality.json` holds: `psnr_db`, `first_frame_psnr_db`, `steps`, `seconds`.
    """
    if config.precision == "auto":
        is_quick = has_quick_bf16(torch.device(device))
        config = config.model_copy(update={"precision": "bf16" if is_quick else "fp32"})
    run = _Run(config, start, out / CHECKPOINT_NAME, device)
    total = config.image_steps + config.steps
    for signal_BCTHW, generator in _batches(config, render, run.step):
        begun_s = time.monotonic()
        loss, mse = _losses(run.vae, signal_BCTHW.to(device), config, generator)
        run.vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(run.vae.parameters(), 1.0, error_if_nonfinite=True)
        run.optimizers.step(_schedule(config, run.step))
        run.average.update_parameters(run.vae)
        run.step += 1
        run.seconds += time.monotonic() - begun_s
        if run.step % config.checkpoint_every_steps == 0:
            run.save()
        if progress is not None:
            psnr = 10 * math.log10(4 / max(mse.item(), 1e-12))
            progress({"step": run.step, "steps": total, "loss": loss.item(), "psnr_db": psnr})
    averaged_vae: Vae = run.average.module.eval()
    _set_statistics(averaged_vae, config, render)
    save_codec(averaged_vae, out)
    quality = measure(VideoCodec.load(out), render, config.eval_clips, config.eval_frames)
    quality |= {"steps": total, "seconds": round(run.seconds, 1)}
    write_json(out / "quality.json", quality)
    run.end()
    return quality
