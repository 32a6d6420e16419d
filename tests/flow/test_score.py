"""Score-based denoising: the gradient of the log-density.

It is held against a closed form where there is one, and against autograd everywhere.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flow.flow import FlowModel
from flow.likelihood import likelihood
from flow.sample_spec import SampleError, SampleSpec
from flow.sampling import DeepStream, FrameStream, sample
from flow.score import score, tweedie
from tests.flow.models import STRUCTURES, latents, randn, texts, tiny_config, tiny_model


@pytest.mark.parametrize("structure", STRUCTURES)
def test_score_is_the_gradient_of_the_log_prob(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flow.score.CHUNK_TOKENS", 13)
    model = tiny_model(**STRUCTURES[structure])
    x, (text, _) = latents(model).requires_grad_(), texts(model, 2)
    (expected,) = torch.autograd.grad(model.flow(x, text).log_prob().sum(), x)
    gradient = score(model.flow, x.detach(), text)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(
        tweedie(model.flow, x.detach(), text), x.detach() + 0.3**2 * expected, atol=1e-10, rtol=0
    )
    if not model.config.video:
        assert torch.equal(score(model.flow, x[:, 0].detach(), text), gradient[:, 0])


def test_score_of_a_standard_normal_is_minus_x() -> None:
    model = FlowModel(tiny_config()).double()
    x, (text, _) = latents(model), texts(model, 2)
    torch.testing.assert_close(score(model.flow, x, text), -x, atol=1e-12, rtol=0)
    clean = tweedie(model.flow, x, text)
    torch.testing.assert_close(clean, (1 - 0.3**2) * x, atol=1e-12, rtol=0)


def test_score_denoising_finds_the_mean_of_noisy_gaussians() -> None:
    """x ~ N(m, s²) with noise σ: the noisy density gives m + s²/(s² + σ²)·(x_noisy - m)."""
    mean, spread, sigma = 0.7, 0.4, 0.3
    model = FlowModel(tiny_config(soft_clip=0.0)).double()
    bias = model.flow.deep.proj_out.bias
    with torch.no_grad():
        bias[: len(bias) // 2] = math.log(math.expm1(math.hypot(spread, sigma))) - 0.541324854612918
        bias[len(bias) // 2 :] = mean
    x_noisy = latents(model)
    expected = mean + spread**2 / (spread**2 + sigma**2) * (x_noisy - mean)
    torch.testing.assert_close(tweedie(model.flow, x_noisy), expected, atol=1e-9, rtol=0)


def test_later_frames_reach_earlier_ones() -> None:
    model = tiny_model()
    x, (text, _) = latents(model), texts(model, 2)
    moved = x.clone()
    moved[:, -1] += 1
    change = (score(model.flow, moved, text) - score(model.flow, x, text)).abs()
    assert (change.amax(dim=(0, 2, 3, 4)) > 0).all()


def test_score_of_a_long_video_is_that_of_its_windows() -> None:
    model = tiny_model()
    x, (text, _) = latents(model, frames=7), texts(model, 2)
    spec = SampleSpec(num_frames=7, grid=(2, 3), window_frames=4, context_frames=2)
    windows = [*spec.context_windows()]
    gradient = score(model.flow, x, text, windows=windows)

    def log_prob(y: Tensor) -> float:
        return float(likelihood(model.flow, y, text, windows=windows).log_prob().sum())

    for seed in range(3):
        step = 1e-5 * randn(*x.shape, seed=40 + seed)
        slope = (log_prob(x + step) - log_prob(x - step)) / 2
        assert slope == pytest.approx(float((gradient * step).sum()), abs=1e-9)


def test_a_stream_answers_at_its_end_with_the_whole_clips_result() -> None:
    model = tiny_model()
    text, null = texts(model)
    spec = SampleSpec(num_frames=4, grid=(2, 3), seed=3, guidance=1.5, tolerance=0.0)
    noisy = sample(model, text, null, spec, denoiser="none")
    expected = tweedie(model.flow, noisy, text)
    whole = sample(model, text, null, spec, denoiser="score")
    torch.testing.assert_close(whole, expected, atol=1e-10, rtol=0)
    deep = DeepStream(model.flow, text, null, spec)
    frames = FrameStream(model, text, "score", shallow_tolerance=0.0)
    with torch.inference_mode():
        while not deep.done:
            assert frames.push(deep.next_frame()) == []
        out = frames.finish()
        assert frames.finish() == []
    torch.testing.assert_close(torch.stack(out, 1), expected, atol=1e-10, rtol=0)


def test_a_long_sample_is_denoised_through_the_windows_it_was_made_in() -> None:
    model = tiny_model()
    text, _ = texts(model)
    spec = SampleSpec(num_frames=6, grid=(2, 3), window_frames=3, tolerance=0.0)
    noisy = sample(model, text, None, spec, denoiser="none")
    expected = tweedie(model.flow, noisy, text, windows=[*spec.context_windows()])
    assert (tweedie(model.flow, noisy, text) - expected).abs().max() > 1e-6
    clean = sample(model, text, None, spec, denoiser="score")
    torch.testing.assert_close(clean, expected, atol=1e-10, rtol=0)


def test_score_needs_no_denoiser_and_an_unknown_one_is_refused() -> None:
    model = tiny_model(denoiser=False)
    spec = SampleSpec(num_frames=2, grid=(2, 3))
    assert sample(model, texts(model)[0], None, spec, denoiser="score").shape == (1, 2, 4, 2, 3)
    with pytest.raises(SampleError, match="this model has none; ask for 'score' or 'none'"):
        sample(model, texts(model)[0], None, spec, denoiser="learned")
    with pytest.raises(SampleError, match="denoiser = 'tweedie'"):
        sample(model, texts(model)[0], None, spec, denoiser="tweedie")
