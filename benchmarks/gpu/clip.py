"""Part 4: what a whole clip costs, and what of it would not fit smaller cards.

Random weights say nothing of how many passes a clip takes, so the counts are those of the trained
small model on its own clip, scaled: a window of the deep block takes as many passes as it does
there (one count for the first frame, one for later frames), and a frame of more tokens has as many
more windows; a shallow block takes as many sweeps as it does there. All these passes are made, at
the released shape, by the product's own streams; only the moment of acceptance is dictated.

Knows the networks of a clip, each alone on the device. Knows nothing of sessions or replicas.

Shapes: B batch (1), T latent frames, H, W tokens, C numbers per token, N tokens per frame.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.gpu.codec import decode_seconds
from benchmarks.gpu.device import free, peak_gb, time_once
from benchmarks.gpu.fixtures import TRAINED, load_fixture
from benchmarks.gpu.models import parameter_gb, random_network, random_tensor
from benchmarks.gpu.parts import CARDS_GB
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.shapes import Shapes
from flow.block import AffineBlock
from flow.counters import Work
from flow.denoiser import Denoiser
from flow.flow import DeepShallowFlow
from flow.inverse import Inverter, Steps
from flow.rope import RopeCache
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream
from flow.shallow import shallow_inverse

GUIDANCE = 2.5
ALL_ACCEPTED = 1e30
"""A tolerance that every token is within, so that each look accepts all that it looks at."""
RESERVE_S = 12.0
"""What the deep block's clip must leave of the part's time."""


@dataclass(frozen=True)
class Counts:
    """What the trained small model took.

    cold, warm: passes of the deep block for one window of the first frame, and of a later one.
    sweeps: of each shallow block, the first block of the flow first.
    """

    cold: float
    warm: float
    sweeps: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Gigabytes of one network at work: its weights (and cache), and the peak; None on a CPU."""

    planned_gb: float
    weights_gb: float
    peak_gb: float | None


def measure(recorder: Recorder, shapes: Shapes, device: torch.device) -> None:
    """All rows of the part: counts, shallow blocks, denoiser, deep block, what fits, codec."""
    recorder.say("counts of the trained small model, on the CPU")
    by_looks = {
        every: recorder.attempt(
            "counts of the trained small model", functools.partial(trained_counts, shapes, every)
        )
        for every in (1, 4)
    }
    for every, counts in by_looks.items():
        if counts is not None:
            _show_counts(recorder, every, counts)
    counts = by_looks[1 if device.type == "cpu" else 4]
    if counts is None:
        return
    memory: dict[str, Memory] = {}
    runs = {
        "shallow inverse": functools.partial(_shallow, recorder, shapes, device, counts, memory),
        "denoiser": functools.partial(_denoiser, recorder, shapes, device, memory),
        "deep block": functools.partial(_deep, recorder, shapes, device, counts, memory),
    }
    took = {name: recorder.attempt(name, run, needs_s=5.0) for name, run in runs.items()}
    parts_s = [seconds for seconds in took.values() if seconds is not None]
    frames, height, width = shapes.video
    if len(parts_s) == len(took):
        note = f"{frames} frames of {height} x {width}, guidance {GUIDANCE}"
        recorder.figure("a whole clip, codec apart", sum(parts_s), "s", note=note)
    _show_memory(recorder, memory)
    decode = functools.partial(decode_seconds, recorder, shapes, device)
    recorder.attempt("codec decode", decode, needs_s=5.0)


def trained_counts(shapes: Shapes, look_every: int) -> Counts:
    """Passes and sweeps of the trained small model, with so many passes from look to look."""
    fixture = load_fixture(TRAINED)
    tensors, flow = fixture.tensors, fixture.model.flow
    noise = tensors["noise"][:1, : shapes.counted_frames]
    spec = SampleSpec(
        num_frames=noise.shape[1], grid=(noise.shape[-2], noise.shape[-1]), guidance=GUIDANCE
    )
    text, null = tensors["text"][:1], tensors["text_null"][:1]
    stream = DeepStream(flow, text, null, spec, noise=lambda n: noise[:, n])
    stream.inverter.look_every = look_every
    for _ in range(spec.num_frames):
        stream.next_frame()
    first, *later = (work.iterations for work in stream.counters.per_frame)
    tokens = stream.counters.tokens_per_frame
    shallow = [Work() for _ in flow.shallow]
    shallow_inverse(flow, tensors["deep_guided"][:1, : spec.num_frames], work=shallow)
    return Counts(
        cold=first * min(spec.cold_slide_tokens, tokens) / tokens,
        warm=sum(later) / len(later) * min(spec.slide_tokens, tokens) / tokens,
        # A look comes only after so many sweeps.
        sweeps=tuple(look_every * math.ceil(work.iterations / look_every) for work in shallow),
    )


def _show_counts(recorder: Recorder, look_every: int, counts: Counts) -> None:
    recorder.row(
        "counts of the trained small model",
        passes_from_look_to_look=look_every,
        passes_per_window_of_the_first_frame=counts.cold,
        passes_per_window_later=counts.warm,
        window_of_the_first_frame=SampleSpec.cold_slide_tokens,
        window_later=SampleSpec.slide_tokens,
        shallow_sweeps=" ".join(map(str, counts.sweeps)),
    )


def drive(inverter: Inverter, steps: Steps, most: int) -> int:
    """`Inverter.solve`, stopped with an error after more than `most` passes; how many it took."""
    passes = 0
    with torch.inference_mode():
        for start, stop in steps:
            inverter.evaluate(start, stop)
            passes += 1
            if passes > most:
                raise RuntimeError(
                    f"more than {most} passes: the tokens are not finite, so none is accepted"
                )
    return passes


def _deep(
    recorder: Recorder,
    shapes: Shapes,
    device: torch.device,
    counts: Counts,
    memory: dict[str, Memory],
) -> float:
    """Seconds of the deep block for the whole clip, frame by frame as the product makes it."""
    config, dtype = shapes.config, getattr(torch, shapes.dtype)
    flow = random_network(lambda: _deep_alone(shapes), device, dtype)
    free()
    text = random_tensor(1, config.text_len, config.text_dim, device=device)
    spec = SampleSpec(
        num_frames=shapes.latent_frames,
        grid=shapes.grid,
        guidance=GUIDANCE,
        token_tolerance=ALL_ACCEPTED,
        cold_token_tolerance=ALL_ACCEPTED,
    )
    stream = DeepStream(flow, text, text.flip(1), spec)
    seconds = ms_per_pass = 0.0
    for frame in range(spec.num_frames):
        window, count = (
            (spec.slide_tokens, counts.warm) if frame else (spec.cold_slide_tokens, counts.cold)
        )
        due = count * shapes.frame_tokens / min(window, shapes.frame_tokens)
        if frame > 1 and recorder.left_s < RESERVE_S + 1.5e-3 * ms_per_pass * due:
            rest = spec.num_frames - frame
            seconds += 1e-3 * ms_per_pass * due * rest
            recorder.missing(
                f"the deep block's last {rest} frames", "no time: counted as the last frame made"
            )
            break
        stream.inverter.look_every = max(1, round(count))
        passes, frame_s = _frame(stream, device, most=int(4 * due) + 100)
        ms_per_pass = 1e3 * frame_s / max(1, passes)
        seconds += 1e-3 * ms_per_pass * due
        recorder.row(
            "deep block by frame",
            frame=frame,
            passes_made=passes,
            passes_counted=due,
            seconds_made=frame_s,
            ms_per_pass=ms_per_pass,
        )
    weights = parameter_gb(flow)
    cache = sum(cache.kv_2BHSD.nbytes for cache in stream.inverter.caches) / 1e9
    memory["deep block"] = Memory(weights + cache, weights, peak_gb(device))
    recorder.figure("deep block", seconds, "s", note="passes counted, at the milliseconds made")
    return seconds


def _frame(stream: DeepStream, device: torch.device, most: int) -> tuple[int, float]:
    """(passes, seconds) of a stream's next frame."""
    passes: list[int] = []

    def make() -> None:
        passes.append(drive(stream.inverter, stream.steps(), most))
        stream.emit()

    seconds = time_once(make, device)
    return passes[0], seconds


def _deep_alone(shapes: Shapes) -> DeepShallowFlow:
    """The flow without its shallow blocks: a service may hold the two on two devices."""
    flow = DeepShallowFlow(shapes.config)
    flow.shallow = nn.ModuleList()
    return flow


def _shallow(
    recorder: Recorder,
    shapes: Shapes,
    device: torch.device,
    counts: Counts,
    memory: dict[str, Memory],
) -> float:
    """Seconds of the inverse of all shallow blocks, all frames as one batch."""
    config, dtype = shapes.config, getattr(torch, shapes.dtype)
    num_blocks = config.num_blocks - 1
    # The trained model may have another number of shallow blocks than a toy.
    sweeps = [counts.sweeps[index % len(counts.sweeps)] for index in range(num_blocks)]
    blocks = random_network(
        lambda: nn.ModuleList(AffineBlock(config, index) for index in range(num_blocks)),
        device,
        dtype,
    )
    free()
    z_TNC = random_tensor(
        shapes.latent_frames, shapes.frame_tokens, config.token_dim, device=device
    )
    ropes = RopeCache(config.head_dim, config.pos_len)

    def invert() -> None:
        tokens_TNC = z_TNC
        for index in reversed(range(num_blocks)):
            block = blocks[index]
            assert isinstance(block, AffineBlock)
            rope = ropes.get(shapes.grid, 1, 0, like=block.sos)
            inverter = Inverter(block, rope, batch=shapes.latent_frames)
            inverter.restart()
            inverter.look_every = sweeps[index]
            steps = inverter.jacobi(tokens_TNC, tokens_TNC, ALL_ACCEPTED)
            drive(inverter, steps, most=4 * sweeps[index])
            tokens_TNC = inverter.tokens_BLC

    seconds = min(time_once(invert, device) for _ in range(2))
    weights = parameter_gb(blocks)
    memory["shallow blocks"] = Memory(weights, weights, peak_gb(device))
    note = f"{' '.join(map(str, sweeps))} sweeps, {shapes.latent_frames} frames as one batch"
    recorder.figure("shallow inverse", seconds, "s", note=note)
    return seconds


@torch.inference_mode()
def _denoiser(
    recorder: Recorder, shapes: Shapes, device: torch.device, memory: dict[str, Memory]
) -> float:
    """Seconds of the denoiser for the whole clip at once, as the released weights need it."""
    config, dtype = shapes.config, getattr(torch, shapes.dtype)
    denoiser = random_network(lambda: Denoiser(config), device, dtype)
    free()
    shape = (1, shapes.latent_frames, config.latent_channels, *shapes.grid)
    x_BTCHW = random_tensor(*shape, device=device)
    text = random_tensor(1, config.text_len, config.text_dim, device=device)
    seconds = min(time_once(lambda: denoiser(x_BTCHW, text), device) for _ in range(2))
    weights = parameter_gb(denoiser)
    memory["denoiser"] = Memory(weights, weights, peak_gb(device))
    recorder.figure("denoiser", seconds, "s", note="the whole clip at once")
    return seconds


def _show_memory(recorder: Recorder, memory: dict[str, Memory]) -> None:
    """What each network takes at work, and all of them loaded with one at work at a time."""
    for name, used in memory.items():
        _fits(recorder, name, used.planned_gb, used.peak_gb)
    weights = sum(used.weights_gb for used in memory.values())
    planned = max((used.planned_gb - used.weights_gb for used in memory.values()), default=0.0)
    peaks = [used.peak_gb - used.weights_gb for used in memory.values() if used.peak_gb is not None]
    together = weights + max(peaks) if peaks else None
    _fits(recorder, "all of them loaded, one at work", weights + planned, together)


def _fits(recorder: Recorder, name: str, planned: float, peak: float | None) -> None:
    """Whether the peak, or without one what is planned, is within the memory of cards."""
    memory_gb = planned if peak is None else peak
    fits = {f"fits_{card}_gb": memory_gb <= card for card in CARDS_GB}
    recorder.row("memory", network=name, weights_and_cache_gb=planned, peak_gb=peak, **fits)
