"""The sliding window: exact at tolerance 0 from any start, and what it accepts is certified."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flow.certificate import certificate
from flow.flow import FlowModel
from flow.inverse import Inverter
from flow.packed_weights import can_pack
from flow.released_checkpoint import import_released
from flow.sample_spec import SampleSpec
from flow.sampling import DeepStream, batch_noise
from flow.sliding import SlidingWindow, _settle, _settle_unseen, slide, suggest
from tests.flow.models import randn, shaken, texts, tiny_model
from tests.places import TRAINED_SMALL

ORDERS = {"forward": (1, 1, 1, 2), "reverse": (1, 1, 2)}
SPEC = SampleSpec(
    num_frames=4, grid=(2, 3), seed=7, guidance=2.0, schedule="sliding", tolerance=0.0
)
GRID, FRAMES, LENGTH = (2, 4), 3, 24


def _model(strength: float = 0.25) -> FlowModel:
    model = tiny_model()
    if strength > 0.25:
        shaken(model, seed=3, scale=strength)
    return model


def _inverter(model: FlowModel, batch: int = 2, guidance: float = 2.0) -> Inverter:
    text, null = texts(model, batch, dtype=model.flow.deep.sos.dtype)
    rope = model.flow.deep_rope(GRID, FRAMES, text)
    inverter = Inverter(
        model.flow.deep, rope, batch=batch, text_BJE=text, null_BJE=null, guidance=guidance
    )
    inverter.restart()
    return inverter


def _slide(
    inverter: Inverter, z: Tensor, until: int = LENGTH, size: int = 5, tolerance: float = 0.0
) -> int:
    window = SlidingWindow(size, cold=min(size, 3), columns=GRID[1], period=8)
    return inverter.solve(slide(inverter, z, 0, until, window, tolerance))


def _frames(model: FlowModel, spec: SampleSpec, **more: object) -> Tensor:
    stream = DeepStream(model.flow, *texts(model), spec, **more)  # type: ignore[arg-type]
    frames = []
    while not stream.done:
        frames.append(stream.next_frame())
    return torch.cat(frames, dim=1)


def _residual_rms(model: FlowModel, tokens: Tensor, z: Tensor) -> Tensor:
    """Root mean square of r of each token [B, L], from a parallel pass of its own."""
    inverter = _inverter(model, batch=len(z))
    inverter.restart(tokens.clone())
    r = (tokens - inverter.mu_BLC) / inverter.sigma_BLC - z
    return r.square().mean(-1).sqrt()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_sliding_gives_the_sequential_video(order: str, guidance: float, size: int) -> None:
    model = tiny_model(layers_per_block=ORDERS[order])
    for changes in (
        {},
        {"num_frames": 8, "window_frames": 3, "context_frames": 2},
        {"num_frames": 1},
    ):
        spec = dataclasses.replace(
            SPEC, guidance=guidance, slide_tokens=size, cold_slide_tokens=3, **changes
        )
        reference = _frames(model, dataclasses.replace(spec, schedule="sequential"))
        torch.testing.assert_close(_frames(model, spec), reference, atol=1e-10, rtol=0)


def test_a_batch_and_a_stream_without_text_slide_exactly() -> None:
    model = tiny_model()
    text, null = texts(model, 2)
    more = {"noise": batch_noise([7, 8], (4, 2, 3))}
    both = {}
    for schedule in ("sliding", "sequential"):
        spec = dataclasses.replace(SPEC, schedule=schedule)
        stream = DeepStream(model.flow, text, null, spec, **more)  # type: ignore[arg-type]
        bare = DeepStream(model.flow, None, None, dataclasses.replace(spec, guidance=0.0))
        both[schedule] = [s.next_frame() for s in (stream, bare) for _ in range(4)]
    for a, b in zip(both["sliding"], both["sequential"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def _starts() -> dict[str, Tensor]:
    tail = torch.zeros(2, LENGTH, 4, dtype=torch.float64)
    tail[:, 3:] = 1e30
    broken = tail.clone()
    broken[:, 5:] = torch.nan
    return {
        "huge": torch.full_like(tail, 1e3),
        "minus huge": torch.full_like(tail, -1e3),
        "zeros": torch.zeros_like(tail),
        "random": 10 * randn(2, LENGTH, 4, seed=9),
        "blown-up tail": tail,
        "not a number": broken,
    }


@pytest.mark.parametrize("start", [*_starts(), "shuffled frames"])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_any_start_gives_the_sequential_tokens(start: str, strength: float) -> None:
    model, z = _model(strength), randn(2, LENGTH, 4, seed=5)
    reference = _inverter(model)
    reference.solve(reference.sequential(z))
    inverter = _inverter(model)
    solution = reference.tokens_BLC.unflatten(1, (FRAMES, 8))[:, [2, 0, 1]].flatten(1, 2)
    suggest(inverter, {**_starts(), "shuffled frames": solution}[start])
    assert _slide(inverter, z) <= LENGTH
    torch.testing.assert_close(inverter.tokens_BLC, reference.tokens_BLC, atol=1e-10, rtol=0)


def test_strong_coupling_is_strong() -> None:
    """The test above would prove little if one sweep already gave the answer."""
    model, z = _model(1.0), randn(2, LENGTH, 4, seed=5)
    inverter = _inverter(model)
    assert _slide(inverter, z, tolerance=1e-6) > LENGTH // 2


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_every_iteration_makes_at_least_one_token_final(tolerance: float) -> None:
    model, z = _model(), randn(2, LENGTH, 4, seed=5)
    reference = _inverter(model)
    reference.solve(reference.sequential(z))
    inverter = _inverter(model)
    suggest(inverter, randn(2, LENGTH, 4, seed=6))
    iterations, final = 0, torch.zeros_like(z)
    for until in range(1, LENGTH + 1):
        iterations += _slide(inverter, z, until, tolerance=tolerance)
        assert inverter.solved >= max(until, iterations)
        solved = inverter.tokens_BLC[:, : inverter.solved]
        if tolerance == 0:
            expected = reference.tokens_BLC[:, : inverter.solved]
            torch.testing.assert_close(solved, expected, atol=1e-11, rtol=0)
        assert torch.equal(solved[:, : until - 1], final[:, : until - 1]), "a final token moved"
        final[:, : inverter.solved] = solved
    assert inverter.work.iterations == iterations


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kept_cache_is_that_of_the_final_tokens(tolerance: float, dtype: torch.dtype) -> None:
    model, z = _model().to(dtype), randn(2, LENGTH, 4, seed=5).to(dtype)
    assert can_pack(model.flow.deep) == (dtype == torch.float32)
    inverter = _inverter(model)
    iterations = _slide(inverter, z, tolerance=tolerance)
    assert iterations < LENGTH or tolerance < 0.5, "the test wants tokens accepted as they stand"
    again = _inverter(model)
    again.restart(inverter.tokens_BLC.clone())
    atol = 1e-11 if dtype == torch.float64 else 2e-5
    for a, b in zip(inverter.caches, again.caches, strict=True):
        torch.testing.assert_close(a.k_BHSD, b.k_BHSD, atol=atol, rtol=0)
        torch.testing.assert_close(a.v_BHSD, b.v_BHSD, atol=atol, rtol=0)
    torch.testing.assert_close(inverter.mu_BLC, again.mu_BLC, atol=atol, rtol=0)


@pytest.mark.parametrize("start", [*_starts()])
@pytest.mark.parametrize("tolerance", [0.03, 0.3])
def test_no_tail_however_wild_hides_a_residual(start: str, tolerance: float) -> None:
    model, z = _model(), randn(2, LENGTH, 4, seed=5)
    inverter = _inverter(model)
    suggest(inverter, _starts()[start])
    _slide(inverter, z, size=8, tolerance=tolerance)
    assert _residual_rms(model, inverter.tokens_BLC, z).max() <= tolerance + 1e-9


def test_a_token_whose_neighbour_is_not_a_number_is_not_accepted_as_it_stands() -> None:
    model, z = _model(), randn(2, LENGTH, 4, seed=5)
    z[:, 6] = torch.nan
    inverter = _inverter(model)
    assert _slide(inverter, z[:, :8], until=6, tolerance=0.05) <= 6
    # Tokens that are not numbers are behind these six, which do not depend on them.
    tokens = inverter.tokens_BLC.clone()
    tokens[:, 6:] = 0
    clean = _residual_rms(model, tokens, z)
    assert clean[:, :6].max() <= 0.05 + 1e-9


@pytest.mark.parametrize("near", [0, 3, 8], ids=["none near", "three near", "all near"])
def test_settling_seen_and_unseen_is_the_same(near: int) -> None:
    """With the prefix known on the host, by slices; without, by masks."""
    inverter, z = _inverter(_model()), randn(2, 8, 4)
    carry = SlidingWindow(8, cold=8, columns=GRID[1], period=8).carry_matrix(z)
    inverter.tokens_BLC[:, :8] = randn(2, 8, 4, seed=1)
    inverter.evaluate(0, 8)
    exact = torch.addcmul(inverter.mu_BLC[:, :8], inverter.sigma_BLC[:, :8], z)
    inverter.tokens_BLC[:, :near] = exact[:, :near]
    before = inverter.tokens_BLC.clone()
    prefix = _settle(inverter, 0, 8, z, carry, 1e-6)
    by_slices = inverter.tokens_BLC.clone()
    inverter.tokens_BLC.copy_(before)
    prefix_unseen = _settle_unseen(inverter, 0, 8, z, carry, 1e-6)
    assert prefix == int(prefix_unseen) == near
    torch.testing.assert_close(inverter.tokens_BLC, by_slices, atol=1e-12, rtol=0)
    assert torch.equal(
        by_slices[:, : near + 1][:, :8], torch.cat([before[:, :near], exact[:, near : near + 1]], 1)
    )


def test_frames_do_not_depend_on_how_long_the_video_goes_on() -> None:
    model = tiny_model()
    spec = dataclasses.replace(SPEC, tolerance=1e-3, num_frames=3)
    longer = _frames(model, dataclasses.replace(spec, num_frames=6, window_frames=6))
    torch.testing.assert_close(longer[:, :3], _frames(model, spec), atol=1e-9, rtol=0)


def test_packed_pass_gives_the_plain_numbers() -> None:
    model, z = _model().float(), randn(2, LENGTH, 4, seed=5).float()
    for guidance in (0.0, 2.0):
        packed, plain = (_inverter(model, guidance=guidance) for _ in range(2))
        plain.use_packed(0)
        _slide(packed, z)
        _slide(plain, z)
        torch.testing.assert_close(packed.tokens_BLC, plain.tokens_BLC, atol=1e-4, rtol=0)


def test_default_tolerance_meets_its_certificate_on_trained_weights() -> None:
    model, _ = import_released(TRAINED_SMALL / "weights.pth", TRAINED_SMALL / "config.yaml")
    case = load_file(TRAINED_SMALL / "case.safetensors")
    text, null = case["text"][:1], case["text_null"][:1]
    spec = SampleSpec(num_frames=9, grid=(8, 8), guidance=2.5)
    stream = DeepStream(model.flow, text, null, spec, noise=lambda n: case["noise"][:1, n])
    u = torch.cat([stream.next_frame() for _ in range(9)], dim=1)
    proof = certificate(model.flow, u, text, null, spec, noise=lambda n: case["noise"][:1, n])
    # A token's root mean square within the tolerance bounds each of its numbers.
    assert proof.max_abs <= spec.token_tolerance * 48**0.5 + 1e-3
    assert proof.p999_abs < 0.2
    expected = case["deep_guided"][:1]
    assert (u - expected).norm() / expected.norm() < 3e-2
    assert stream.counters.iterations <= 70
    assert stream.counters.token_evaluations <= 4.0 * 9 * 64
