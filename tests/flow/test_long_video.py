"""Videos far beyond the trained length: frames do not depend on what follows, memory stays flat."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch import Tensor

from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream, FrameStream
from tests.flow.models import texts, tiny_model

TRAINED_FRAMES = 3
SPEC = SampleSpec(
    num_frames=20 * TRAINED_FRAMES,
    grid=(2, 3),
    guidance=2.0,
    tolerance=0.0,
    slide_tokens=5,
    window_frames=TRAINED_FRAMES,
)


def _live_bytes() -> int:
    """Bytes of all tensors that anything still holds, each storage once."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor and not tensor.is_mkldnn
    }
    return sum(storages.values())


@pytest.mark.parametrize("schedule", ["sliding", "jacobi"])
@pytest.mark.parametrize("context", [1, 2])
def test_a_frame_made_alone_is_the_frame_of_the_long_video(schedule: str, context: int) -> None:
    model = tiny_model()
    text, null = texts(model)
    spec = dataclasses.replace(SPEC, num_frames=14, schedule=schedule, context_frames=context)
    stream = DeepStream(model.flow, text, null, spec)
    video = [stream.next_frame() for _ in range(spec.num_frames)]
    for n in (0, 1, 2, 3, 7, 13):
        only = dataclasses.replace(spec, num_frames=n + 1)
        alone = DeepStream(model.flow, text, null, only, emitted=video[:n])
        torch.testing.assert_close(alone.next_frame(), video[n], atol=1e-10, rtol=0)


@pytest.mark.slow
def test_twenty_times_the_trained_length_takes_no_more_memory() -> None:
    model = tiny_model(dtype=torch.float32)
    text, null = texts(model, dtype=torch.float32)
    deep = DeepStream(model.flow, text, null, dataclasses.replace(SPEC, tolerance=1e-3))
    frames = FrameStream(model, text)
    live_bytes, num_frames = [], 0
    while not deep.done:
        num_frames += len(frames.push(deep.next_frame()))
        if deep.frame_index % TRAINED_FRAMES == 0:
            live_bytes.append(_live_bytes())
    assert num_frames + len(frames.finish()) == SPEC.num_frames
    # The denoiser sees ten frames back, so its caches are full after four of these steps.
    assert max(live_bytes[5:]) <= max(live_bytes[:5])
