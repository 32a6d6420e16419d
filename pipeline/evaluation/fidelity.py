"""How true the default sampler is: its samples against those of the exact one at the same noise.

Knows the flow's streams. Knows nothing of codecs or files.

Shapes: B videos, t latent frames, H, W tokens, C channels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flow.certificate import Certificate, certificate
from flow.flow import FlowModel
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream, Noise, frame_stream
from pipeline.evaluation.samples import Texts, exact


@dataclass(frozen=True)
class Fidelity:
    """The schedule that videos are made with against `sequential`, at the same noise.

    Attributes:
        schedule: what is measured.
        deep_relative_rms: rms error of the deep block's output over the rms of the exact one.
        deep_max_abs: its largest error.
        latent_relative_rms: the same of the final latents, after shallow blocks and denoiser.
        certificate_max_abs, certificate_p999_abs: |r| of the samples: how far the noise that would
            have given them exactly is from the noise asked for, standard deviations of the prior.
        sequential_certificate_max_abs: the same of the exact samples: what rounding does.
        iterations, evaluations_per_token: what the schedule took.
        speedup: seconds of `sequential` over those of the schedule, deep block only.
        videos: how many were compared.
    """

    schedule: str
    deep_relative_rms: float
    deep_max_abs: float
    latent_relative_rms: float
    certificate_max_abs: float
    certificate_p999_abs: float
    sequential_certificate_max_abs: float
    iterations: int
    evaluations_per_token: float
    speedup: float
    videos: int


@dataclass(frozen=True)
class _Run:
    """One way of sampling a batch."""

    u_BTHWC: Tensor
    latents: Tensor
    proof: Certificate
    stream: DeepStream
    seconds: float


@torch.no_grad()
def fidelity(
    model: FlowModel, texts: Texts, spec: SampleSpec, noise: Noise, *, denoiser: str
) -> Fidelity:
    """Sample a batch twice, as `spec` says and exactly, and compare.

    Args:
        model: the model.
        texts: what it is told of each video.
        spec: the schedule to measure.
        noise: prior noise of a frame, one video a row.
        denoiser: as in `flow.sampling.frame_stream`.
    """
    fast = _run(model, texts, spec, noise, denoiser)
    slow = _run(model, texts, exact(spec), noise, denoiser)
    return Fidelity(
        schedule=spec.schedule,
        deep_relative_rms=_relative_rms(fast.u_BTHWC, slow.u_BTHWC),
        deep_max_abs=float((fast.u_BTHWC - slow.u_BTHWC).abs().max()),
        latent_relative_rms=_relative_rms(fast.latents, slow.latents),
        certificate_max_abs=fast.proof.max_abs,
        certificate_p999_abs=fast.proof.p999_abs,
        sequential_certificate_max_abs=slow.proof.max_abs,
        iterations=fast.stream.counters.iterations,
        evaluations_per_token=fast.stream.counters.evaluations_per_token,
        speedup=slow.seconds / fast.seconds,
        videos=len(fast.u_BTHWC),
    )


def _run(model: FlowModel, texts: Texts, spec: SampleSpec, noise: Noise, denoiser: str) -> _Run:
    text, null = texts.text_BJE, texts.null_BJE
    stream = DeepStream(model.flow, text, null, spec, noise=noise)
    started = time.perf_counter()
    u_BTHWC = torch.cat([stream.next_frame() for _ in range(spec.num_frames)], dim=1)
    seconds = time.perf_counter() - started
    frames = frame_stream(model, text, spec, denoiser)
    latents = torch.stack([*frames.push(u_BTHWC), *frames.finish()], dim=1)
    proof = certificate(model.flow, u_BTHWC, text, null, spec, noise=noise)
    return _Run(u_BTHWC, latents, proof, stream, seconds)


def _relative_rms(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())
