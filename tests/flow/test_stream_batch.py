"""Streams that share passes get what they would get alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flow.flow import FlowModel
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream
from flow.stream_batch import (
    StreamBatch,
    evaluate_together,
    next_frames,
)
from tests.flow.models import texts, tiny_model

SPEC = SampleSpec(num_frames=5, grid=(2, 3), guidance=2.0, tolerance=0.0, slide_tokens=5)
KINDS = (
    {"seed": 1},
    {"seed": 2, "num_frames": 7, "window_frames": 3},
    {"seed": 3, "schedule": "jacobi", "block_size": 2},
    {"seed": 4, "schedule": "sequential", "guidance": 0.0},
)


def _stream(model: FlowModel, changes: dict[str, object]) -> DeepStream:
    spec = dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]
    text, null = texts(model, dtype=model.flow.deep.sos.dtype)
    return DeepStream(model.flow, text, null if spec.guidance else None, spec)


def _alone(model: FlowModel, changes: dict[str, object]) -> Tensor:
    stream = _stream(model, changes)
    return torch.cat([stream.next_frame() for _ in range(stream.spec.num_frames)], dim=1)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_streams_at_different_frames_get_what_they_get_alone(
    dtype: torch.dtype, atol: float
) -> None:
    model = tiny_model().to(dtype)
    streams = [_stream(model, kind) for kind in KINDS]
    frames_of: list[list[Tensor]] = [[] for _ in streams]
    for ahead, stream in enumerate(streams):  # stream i begins i frames ahead of the others
        frames_of[ahead] = [stream.next_frame() for _ in range(ahead)]
    while waiting := [s for s in streams if not s.done]:
        for stream, frame in zip(waiting, next_frames(waiting), strict=True):
            frames_of[streams.index(stream)].append(frame)
    for frames, kind in zip(frames_of, KINDS, strict=True):
        torch.testing.assert_close(torch.cat(frames, dim=1), _alone(model, kind), atol=atol, rtol=0)


def test_streams_come_and_go_between_passes() -> None:
    model = tiny_model()
    first, second, leaver = (_stream(model, KINDS[i]) for i in (0, 1, 2))
    batch, frames = StreamBatch(), {first: [], second: []}  # type: ignore[var-annotated]
    batch.add(first)
    batch.add(leaver)
    for passes in range(1000):
        if passes == 3:
            batch.add(second)
        if passes == 4:
            batch.remove(leaver)
        for stream, frame in batch.advance():
            frames[stream].append(frame)
            if not stream.done:
                batch.add(stream)
        if passes > 4 and not len(batch):
            break
    for stream, kind in ((first, KINDS[0]), (second, KINDS[1])):
        got = torch.cat(frames[stream], dim=1)
        torch.testing.assert_close(got, _alone(model, kind), atol=1e-10, rtol=0)


def test_a_shared_pass_counts_for_every_stream_as_its_own() -> None:
    model = tiny_model()
    together = [_stream(model, {"seed": seed}) for seed in (1, 2)]
    next_frames(together)
    alone = [_stream(model, {"seed": seed}) for seed in (1, 2)]
    for stream in alone:
        stream.next_frame()
    assert [s.counters for s in together] == [s.counters for s in alone]


def test_streams_of_different_models_are_refused() -> None:
    inverters = [_stream(tiny_model(seed=seed), {}).inverter for seed in (0, 1)]
    with pytest.raises(ValueError, match="group them by model"):
        evaluate_together(inverters, [(0, 1), (0, 1)])


def test_a_frame_begun_twice_is_refused() -> None:
    stream, batch = _stream(tiny_model(), {}), StreamBatch()
    batch.add(stream)
    with pytest.raises(ValueError, match="being made already"):
        batch.add(stream)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_looking_only_every_fourth_pass_gives_the_same_video(kind: dict[str, object]) -> None:
    """What an accelerator does, where every look waits for the device."""
    model = tiny_model()
    stream = _stream(model, kind)
    stream.inverter.look_every = 4
    frames = torch.cat([stream.next_frame() for _ in range(stream.spec.num_frames)], dim=1)
    torch.testing.assert_close(frames, _alone(model, kind), atol=1e-10, rtol=0)
