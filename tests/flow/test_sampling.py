"""Streams: every schedule gives the sequential video, and a resumed stream the uninterrupted one.

Noise comes from seed and frame alone.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flow.certificate import certificate
from flow.counters import Counters
from flow.flow import FlowModel
from flow.released_checkpoint import import_released
from flow.sample_spec import SampleError, SampleSpec
from flow.sampling import DeepStream, FrameStream, batch_noise, frame_noise, sample
from tests.flow.models import randn, texts, tiny_model
from tests.places import TRAINED_SMALL

ORDERS = {"forward": (1, 1, 1, 2), "reverse": (1, 1, 2)}
SPEC = SampleSpec(
    num_frames=4,
    grid=(2, 3),
    seed=7,
    guidance=2.0,
    schedule="jacobi",
    block_size=4,
    tolerance=0.0,
    later_block_factor=1,
)


def _frames(model: FlowModel, spec: SampleSpec, **more: object) -> list[Tensor]:
    stream = DeepStream(model.flow, *texts(model), spec, **more)  # type: ignore[arg-type]
    frames = []
    while not stream.done:
        frames.append(stream.next_frame())
    return frames


def _same(a: list[Tensor], b: list[Tensor], atol: float = 1e-10) -> None:
    torch.testing.assert_close(torch.cat(a, dim=1), torch.cat(b, dim=1), atol=atol, rtol=0)


def test_noise_depends_on_seed_and_frame_alone() -> None:
    first = frame_noise(3, 5, (4, 2, 3))
    torch.manual_seed(0)
    torch.randn(17)
    assert torch.equal(frame_noise(3, 5, (4, 2, 3)), first)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    others = [
        frame_noise(3, 6, (4, 2, 3)),
        frame_noise(4, 5, (4, 2, 3)),
        frame_noise(35, 0, (4, 2, 3)),
    ]
    assert all((other != first).any() for other in others)
    many = torch.cat([frame_noise(s, n, (64,)) for s in range(20) for n in range(20)])
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("block", [1, 4, 6])
def test_jacobi_gives_the_sequential_video(order: str, guidance: float, block: int) -> None:
    model = tiny_model(layers_per_block=ORDERS[order])
    spec = dataclasses.replace(SPEC, guidance=guidance, block_size=block)
    reference = _frames(model, dataclasses.replace(spec, schedule="sequential"))
    _same(_frames(model, spec), reference)
    warm = dataclasses.replace(spec, later_block_factor=4, tolerance=1e-26)
    _same(_frames(model, warm), reference)


@pytest.mark.parametrize("schedule", ["jacobi", "sliding", "sequential"])
@pytest.mark.parametrize("order", ORDERS)
def test_guided_sample_with_first_frame_and_text_meets_its_certificate(
    order: str, schedule: str
) -> None:
    model = tiny_model(layers_per_block=ORDERS[order])
    text, null = texts(model)
    spec = dataclasses.replace(SPEC, schedule=schedule)
    first_u = model.flow.shallow_forward(randn(1, 1, 4, 2, 3, seed=4)).detach()
    for long in (spec, dataclasses.replace(spec, num_frames=8, window_frames=3, context_frames=2)):
        u = torch.cat(_frames(model, long, first_frame_u=first_u), dim=1)
        assert torch.equal(u[:, :1], first_u)
        proof = certificate(model.flow, u, text, null, long, given_frames=1)
        assert proof.max_abs < 1e-10
        assert proof.p999_abs <= proof.max_abs
        assert proof.num_elements == u[:, 1:].numel()
    loose = dataclasses.replace(SPEC, tolerance=0.3, block_size=6)
    u = torch.cat(_frames(model, loose), dim=1)
    assert certificate(model.flow, u, text, null, loose).max_abs > 1e-6


def test_null_text_is_not_read_without_guidance_and_text_may_be_absent() -> None:
    model = tiny_model()
    text, null = texts(model)
    spec = dataclasses.replace(SPEC, guidance=0.0)
    with_null = sample(model, text, null, spec)
    torch.testing.assert_close(sample(model, text, None, spec), with_null)
    assert (sample(model, None, None, spec) != with_null).any()
    with pytest.raises(ValueError, match="guidance"):
        sample(model, text, None, SPEC)


@pytest.mark.parametrize("resume_at", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_resumed_stream_equals_the_uninterrupted_one(
    resume_at: int, given: bool, window: int | None
) -> None:
    model = tiny_model()
    first = model.flow.shallow_forward(randn(1, 1, 4, 2, 3, seed=4)).detach() if given else None
    spec = dataclasses.replace(
        SPEC, num_frames=7, window_frames=window, context_frames=2, tolerance=1e-3
    )
    whole = _frames(model, spec, first_frame_u=first)
    resumed = _frames(model, spec, first_frame_u=first, emitted=whole[:resume_at])
    _same(resumed, whole[resume_at:], atol=1e-9)


def test_long_video_restarts_from_its_context_as_a_new_video_would() -> None:
    model = tiny_model()
    spec = dataclasses.replace(SPEC, num_frames=8, window_frames=4, context_frames=2)
    assert list(spec.context_windows()) == [(0, 0, 4), (2, 4, 6), (4, 6, 8)]
    whole = _frames(model, spec)
    text, null = texts(model)
    alone = dataclasses.replace(spec, num_frames=4, window_frames=None)
    noise = [frame_noise(7, n, (4, 2, 3)).unsqueeze(0) for n in range(8)]
    chunk = DeepStream(
        model.flow, text, null, alone, emitted=whole[2:4], noise=lambda n: noise[n + 2]
    )
    _same([chunk.next_frame(), chunk.next_frame()], whole[4:6])


def test_loose_tolerance_saves_iterations_and_counters_say_so() -> None:
    model = tiny_model()
    exact, loose, one_by_one = Counters(), Counters(), Counters()
    text, null = texts(model)
    for counters, changes in (
        (exact, {}),
        (loose, {"tolerance": 1e-2, "later_block_factor": 4}),
        (one_by_one, {"schedule": "sequential"}),
    ):
        sample(model, text, null, dataclasses.replace(SPEC, **changes), counters=counters)
    assert one_by_one.iterations == one_by_one.token_evaluations == 4 * 6
    assert [work.iterations for work in one_by_one.per_frame] == [6] * 4
    assert loose.iterations < exact.iterations <= one_by_one.iterations
    assert loose.token_evaluations < exact.token_evaluations
    assert one_by_one.prefilled == model.config.text_len
    assert one_by_one.evaluations_per_token == 1.0
    assert [work.iterations for work in one_by_one.shallow] == [6] * 3
    assert len(loose.seconds) == 4
    assert loose.tokens_per_s > 0
    tokens = loose.tokens_per_s * loose.ms_per_iteration * loose.iterations / 1e3
    assert tokens == pytest.approx(4 * 6)


@pytest.mark.parametrize("mode", ["every", "once", "none"])
def test_streams_give_the_same_video_as_sample(mode: str) -> None:
    model = tiny_model(denoiser_lookahead=mode)
    text, null = texts(model)
    whole = sample(model, text, null, SPEC)
    stream, frames = (
        DeepStream(model.flow, text, null, SPEC),
        FrameStream(model, text, shallow_tolerance=0.0),
    )
    out, arrived = [], []
    while not stream.done:
        out += frames.push(stream.next_frame())
        arrived.append(len(out))
    assert arrived == {"every": [0, 0, 0, 0], "once": [0, 1, 2, 3], "none": [1, 2, 3, 4]}[mode]
    out += frames.finish()
    torch.testing.assert_close(torch.stack(out, dim=1), whole, atol=1e-10, rtol=0)
    noisy = sample(model, text, null, SPEC, denoiser="none")
    assert model.denoiser is not None
    with torch.no_grad():
        expected = model.denoise(noisy, model.denoiser(noisy, text))
    torch.testing.assert_close(whole, expected, atol=1e-10, rtol=0)


def test_a_batch_is_the_videos_one_by_one() -> None:
    model = tiny_model()
    text, null = texts(model, 2)
    noise = batch_noise([7, 8], (4, 2, 3))
    both = sample(model, text, null, SPEC, noise=noise)
    for row, seed in enumerate((7, 8)):
        alone = sample(
            model, text[row : row + 1], null[row : row + 1], dataclasses.replace(SPEC, seed=seed)
        )
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-10, rtol=0)
    with pytest.raises(SampleError, match="batch_noise"):
        sample(model, text, null, SPEC)


def test_image_model_makes_one_frame_without_a_denoiser() -> None:
    model = tiny_model(video=False, denoiser=False)
    text, null = texts(model)
    spec = dataclasses.replace(SPEC, num_frames=1)
    assert sample(model, text, null, spec, denoiser="none").shape == (1, 1, 4, 2, 3)
    with pytest.raises(SampleError, match="denoiser"):
        sample(model, text, null, spec)
    with pytest.raises(SampleError, match="num_frames = 4"):
        sample(model, text, null, SPEC, denoiser="none")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_frames", 0),
        ("grid", (0, 2)),
        ("guidance", -1.0),
        ("tolerance", float("nan")),
        ("schedule", "magic"),
        ("block_size", 0),
        ("context_frames", 0),
        ("slide_tokens", 0),
        ("cold_slide_tokens", 0),
        ("token_tolerance", -0.1),
    ],
)
def test_bad_specs_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(SampleError, match=key):
        dataclasses.replace(SPEC, **{key: value})


def test_context_must_leave_room_in_the_window() -> None:
    with pytest.raises(SampleError, match="context_frames = 3"):
        dataclasses.replace(SPEC, num_frames=8, window_frames=3, context_frames=3)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_trained_small_model_gives_its_reference_samples(guidance: float) -> None:
    model, _ = import_released(TRAINED_SMALL / "weights.pth", TRAINED_SMALL / "config.yaml")
    case = load_file(TRAINED_SMALL / "case.safetensors")
    noise, row = case["noise"], slice(0, 1)
    spec = SampleSpec(
        num_frames=9,
        grid=(8, 8),
        guidance=guidance,
        schedule="jacobi",
        block_size=32,
        tolerance=1e-11,
    )
    x = sample(
        model,
        case["text"][row],
        case["text_null"][row],
        spec,
        denoiser="none",
        noise=lambda n: noise[row, n],
    )
    expected = case["sample_guided" if guidance else "sample_sequential"][row]
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=0)
    u = torch.cat([model.flow.shallow_forward(x[:, n : n + 1]).detach() for n in range(9)], dim=1)
    proof = certificate(
        model.flow,
        u,
        case["text"][row],
        case["text_null"][row],
        spec,
        noise=lambda n: noise[row, n],
    )
    assert proof.max_abs < 1e-2
    if guidance:
        torch.testing.assert_close(u, case["deep_guided"][row], atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", ["sliding", "jacobi", "sequential"])
def test_bf16_weights_sample_with_affine_arithmetic_in_fp32(schedule: str) -> None:
    """The certificate of the same weights in fp32 shows bf16 rounding in mu and sigma, no worse."""
    model = tiny_model(torch.bfloat16)
    text, null = texts(model, dtype=torch.bfloat16)
    spec = dataclasses.replace(SPEC, schedule=schedule)
    stream = DeepStream(model.flow, text, null, spec)
    u = torch.cat([stream.next_frame() for _ in range(spec.num_frames)], dim=1)
    assert u.dtype == torch.float32
    assert stream.inverter.caches[0].k_BHSD.dtype == torch.bfloat16
    exact = tiny_model(torch.bfloat16).float()
    proof = certificate(exact.flow, u, text.float(), null.float(), spec)
    assert 1e-6 < proof.max_abs < 0.2
