"""Part 6: the likelihood of a whole clip in one device's memory, the encoder, and its feeder.

Knows the flow's blocks together, and the codec. Knows nothing of data preparation but its command.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.gpu.codec import encode_seconds, feeder
from benchmarks.gpu.device import free, peak_gb, time_once
from benchmarks.gpu.models import parameter_gb, random_network, random_tensor
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.shapes import Shapes
from flow.flow import DeepShallowFlow
from flow.likelihood import CHUNK_TOKENS, likelihood


def measure(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """All rows of the part."""
    run = functools.partial(_likelihood, recorder, shapes, device)
    recorder.attempt("likelihood", run, needs_s=5.0)
    encode = functools.partial(encode_seconds, recorder, shapes, device)
    recorder.attempt("codec encode", encode, needs_s=5.0)
    feed = functools.partial(feeder, recorder, shapes, device)
    recorder.attempt("encoder's feeder", feed, needs_s=5.0)


def _likelihood(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """Seconds and peak by tokens in one pass through a layer."""
    config, dtype = shapes.config, getattr(torch, shapes.dtype)
    flow = random_network(lambda: DeepShallowFlow(config), device, dtype)
    shape = (1, shapes.latent_frames, config.latent_channels, *shapes.grid)
    x_BTCHW = random_tensor(*shape, device=device)
    text = random_tensor(1, config.text_len, config.text_dim, device=device)
    likelihood(flow, x_BTCHW[:, :1], text)
    for chunk in (CHUNK_TOKENS, 4 * CHUNK_TOKENS):
        free()
        losses: list[float] = []

        def score(chunk: int = chunk, losses: list[float] = losses) -> None:
            out = likelihood(flow, x_BTCHW, text, chunk_tokens=chunk)
            losses.append(float(out.loss()))

        seconds = time_once(score, device)
        recorder.row(
            "likelihood of a clip",
            tokens=shapes.tokens,
            chunk_tokens=chunk,
            seconds=seconds,
            tokens_per_s=shapes.tokens / seconds,
            weights_gb=parameter_gb(flow),
            peak_gb=peak_gb(device),
            loss_nats_per_dim=losses[0],
        )
