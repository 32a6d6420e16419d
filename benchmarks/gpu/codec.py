"""The codec at its real size, with random weights, where diffusers is installed.

Knows how long encoding and decoding a clip take. Knows nothing of the flow.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import free, peak_gb, time_once
from benchmarks.gpu.models import parameter_gb, random_tensor
from benchmarks.gpu.parts import BUSY_GOAL
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.shapes import Shapes
from flow.codec_factors import WAN_FACTORS

ROOT = Path(__file__).resolve().parents[2]
FEEDER_NEEDS = ("diffusers", "pydantic", "typing_inspection", "pyarrow", "av", "webdataset")
"""Libraries without which `benchmarks.prepare --feeder` does not start."""
FEEDER_CLIPS = 8
FEEDER_DECODERS = 8


def codec_config(shapes: Shapes, rehearsal: bool) -> dict[str, Any]:
    """Wan2.2's own codec, 704.7M parameters; for a rehearsal one as narrow as can be."""
    channels = shapes.config.latent_channels
    return {
        "base_dim": 8 if rehearsal else 160,
        "decoder_base_dim": 8 if rehearsal else 256,
        "z_dim": channels,
        "dim_mult": [1, 1, 1, 1] if rehearsal else [1, 2, 4, 4],
        "num_res_blocks": 1 if rehearsal else 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": WAN_FACTORS.time,
        "scale_factor_spatial": WAN_FACTORS.space,
        "latents_mean": [0.0] * channels,
        "latents_std": [1.0] * channels,
    }


def random_codec(shapes: Shapes, rehearsal: bool, device: torch.device) -> Any:
    """A `VideoCodec` in fp32, as the product holds it, made on the device."""
    from flow.codec import VideoCodec, build_vae

    with torch.device("meta"):
        vae = build_vae(codec_config(shapes, rehearsal))
    vae = vae.to_empty(device=device)
    with torch.no_grad():
        for parameter in vae.parameters():
            # Norms' gains and biases stay near 1 and 0, so that numbers stay finite.
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.02)
    return VideoCodec(vae, digest="random")


def decode_seconds(recorder: Recorder, shapes: Shapes, device: torch.device) -> float | None:
    """Seconds of decoding the clip latent frame by latent frame; None without diffusers."""
    if find_spec("diffusers") is None:
        recorder.missing("codec decode", "diffusers is not installed")
        return None
    codec = random_codec(shapes, recorder.rehearsal, device)
    shape = (1, shapes.latent_frames, shapes.config.latent_channels, *shapes.grid)
    x_BTCHW = random_tensor(*shape, device=device)
    # The first latent frame is one frame, each later one four: two of them warm both up.
    codec.decode(x_BTCHW[:, :2])
    free()
    seconds = time_once(lambda: codec.decode(x_BTCHW), device)
    _show(recorder, "codec decode", seconds, shapes, codec, device)
    return seconds


def encode_seconds(recorder: Recorder, shapes: Shapes, device: torch.device) -> float | None:
    """Seconds of encoding the clip; None without diffusers."""
    if find_spec("diffusers") is None:
        recorder.missing("codec encode", "diffusers is not installed")
        return None
    codec = random_codec(shapes, recorder.rehearsal, device)
    frames, height, width = shapes.video
    clip = torch.randint(0, 256, (1, frames, height, width, 3), dtype=torch.uint8, device=device)
    codec.encode(clip[:, : WAN_FACTORS.time + 1])
    free()
    seconds = time_once(lambda: codec.encode(clip), device)
    _show(recorder, "codec encode", seconds, shapes, codec, device)
    return seconds


def _show(
    recorder: Recorder, what: str, seconds: float, shapes: Shapes, codec: Any, device: torch.device
) -> None:
    recorder.figure(what, seconds, "s", note="random weights, fp32")
    recorder.row(
        "codec",
        what=what,
        seconds=seconds,
        frames_per_s=shapes.video[0] / seconds,
        weights_gb=parameter_gb(codec.vae),
        peak_gb=peak_gb(device),
    )


def feeder(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """`benchmarks.prepare --feeder` with the random codec: how busy decoders keep the encoder."""
    absent = [name for name in FEEDER_NEEDS if find_spec(name) is None]
    if absent:
        recorder.missing("encoder's feeder", f"{', '.join(absent)}: not installed")
        return
    from flow.codec import save_codec

    with tempfile.TemporaryDirectory(prefix="flowreel-gpu-") as folder:
        codec = random_codec(shapes, recorder.rehearsal, torch.device("cpu"))
        save_codec(codec.vae, Path(folder))
        del codec
        free()
        answer = _feed(recorder, shapes, device, folder)
    share = re.search(r"busy ([\d.]+)% of the time, ([\d.]+) clips/s", answer.stdout)
    if share is None:
        lines = answer.stderr.strip().splitlines() or ["no output"]
        recorder.missing("encoder's feeder", f"exit code {answer.returncode}: {lines[-1]}")
        return
    busy, clips = float(share[1]) / 100, float(share[2])
    note = f"{clips:g} clips/s, {FEEDER_DECODERS} decoders"
    recorder.figure("encoder busy", busy, "of the time", BUSY_GOAL, note)


def _feed(
    recorder: Recorder, shapes: Shapes, device: torch.device, codec: str
) -> subprocess.CompletedProcess[str]:
    frames, height, width = shapes.video
    clips, decoders = (2, 1) if recorder.rehearsal else (FEEDER_CLIPS, FEEDER_DECODERS)
    command = [sys.executable, "-m", "benchmarks.prepare", "--feeder", "--device", device.type]
    command += ["--codec", codec, "--bucket", f"{frames}x{height}x{width}", "--fps", "16"]
    command += ["--source", f"{2 * height}x{2 * width}" if recorder.rehearsal else "720x1280"]
    command += ["--clips", str(clips), "--decoders", str(decoders)]
    limit_s = max(1.0, recorder.left_s - 2.0)
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
    )
