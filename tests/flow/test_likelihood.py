"""Log-densities: sums that agree, chunks that change nothing, memory that stays linear.

And a noise floor that no model can pass.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch

from flow.flow import FlowModel
from flow.likelihood import (
    LikelihoodError,
    NoiseFloorWarning,
    check_noise_floor,
    draw_noise,
    likelihood,
    noise_floor,
    noisy_likelihood,
    over_draws,
)
from flow.sample_spec import SampleSpec
from tests.flow.models import STRUCTURES, latents, randn, texts, tiny_config, tiny_model


def _perfect(sigma: float, value: float) -> FlowModel:
    """The true density of latents that are all `value`, with noise of sigma on them."""
    model = FlowModel(tiny_config(noise_std=sigma, soft_clip=0.0)).double()
    bias = model.flow.deep.proj_out.bias
    with torch.no_grad():
        bias[: len(bias) // 2] = math.log(math.expm1(sigma)) - 0.541324854612918
        bias[len(bias) // 2 :] = value
    return model


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_chunks_of_any_size_give_the_whole(structure: str, chunk: int) -> None:
    model = tiny_model(**STRUCTURES[structure])
    x, (text, _) = latents(model), texts(model, 2)
    whole = model.flow(x, text)
    clip = likelihood(model.flow, x, text, chunk_tokens=chunk)
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(clip.loss_BTHW, whole.nats().sum(-1), **close)
    torch.testing.assert_close(clip.log_prob(), whole.log_prob(), **close)
    torch.testing.assert_close(clip.loss().mean(), whole.loss(), **close)


def test_the_log_prob_is_that_of_the_change_of_variables() -> None:
    """A standard normal prior under z = f(x), by torch's density and autograd's determinant."""
    model = tiny_model(layers_per_block=(1, 1, 1))
    x, (text, _) = latents(model, frames=2, batch=1), texts(model)
    rows = torch.autograd.functional.jacobian(lambda y: model.flow(y, text).z_BTHWC.flatten(), x)
    z = model.flow(x, text).z_BTHWC.detach()
    prior = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), 1).log_prob(z).sum()
    expected = prior + torch.linalg.slogdet(rows.reshape(x.numel(), -1)).logabsdet
    log_prob = likelihood(model.flow, x, text, chunk_tokens=4).log_prob()
    torch.testing.assert_close(log_prob, expected[None], atol=1e-9, rtol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tokens_sum_to_frames_and_frames_to_the_video(structure: str) -> None:
    model = tiny_model(**STRUCTURES[structure])
    x, (text, _) = latents(model), texts(model, 2)
    clip = likelihood(model.flow, x, text, chunk_tokens=5)
    for value in (
        clip.log_prob,
        lambda per: clip.nll(per, "nats"),
        lambda per: clip.loss(per, "nats"),
    ):
        token, frame, video = value("token"), value("frame"), value("video")
        torch.testing.assert_close(token.sum((-2, -1)), frame, atol=1e-11, rtol=0)
        torch.testing.assert_close(frame.sum(-1), video, atol=1e-11, rtol=0)
    p, frames = model.config.patch_size, x.shape[1]
    assert token.shape == (2, frames, x.shape[3] // p, x.shape[4] // p)


def test_constants_and_units_are_what_their_names_say() -> None:
    model = tiny_model()
    clip = likelihood(model.flow, latents(model), texts(model, 2)[0])
    for per, dims in (("video", 4 * 6 * 4), ("frame", 6 * 4), ("token", 4)):
        assert clip.dims(per) == dims
        nats, loss = clip.nll(per, "nats"), clip.loss(per, "nats")
        constant = dims * 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(nats - loss, torch.full_like(nats, constant))
        torch.testing.assert_close(clip.nll(per, "nats_per_dim") * dims, nats)
        torch.testing.assert_close(clip.nll(per, "bits_per_dim") * dims * math.log(2), nats)
    assert torch.equal(clip.log_prob("frame"), -clip.nll("frame", "nats"))


@pytest.mark.parametrize("structure", ["deep block reads forward", "deep block reads in reverse"])
def test_a_frames_value_is_its_density_given_the_frames_before(structure: str) -> None:
    model = tiny_model(**STRUCTURES[structure])
    x, (text, _) = latents(model), texts(model, 2)
    frames = likelihood(model.flow, x, text).log_prob("frame")
    longer = [likelihood(model.flow, x[:, : n + 1], text).log_prob() for n in range(4)]
    torch.testing.assert_close(frames.cumsum(1), torch.stack(longer, 1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_tokens_value_lies_at_its_place(structure: str) -> None:
    """With an identity flow a token's loss is half its square: any misplacement would show."""
    model = FlowModel(tiny_config(**STRUCTURES[structure])).double()
    x = latents(model)
    p = model.config.patch_size
    cells = 0.5 * x.square().sum(2)
    expected = cells.unflatten(-1, (-1, p)).unflatten(-3, (-1, p)).sum((-1, -3))
    clip = likelihood(model.flow, x, texts(model, 2)[0], chunk_tokens=5)
    torch.testing.assert_close(clip.loss_BTHW, expected, atol=1e-12, rtol=0)


def test_the_last_token_read_moves_only_its_own_value() -> None:
    """In the order of a one-block flow, whichever it is, nothing depends on the token read last."""
    for reverse, place in ((False, (-1, -1, -1)), (True, (-1, 0, 0))):
        layers = (1, 1) if not reverse else (1,)
        model = tiny_model(layers_per_block=layers)
        if not reverse:  # the shallow block, which reads in reverse, is made the identity
            torch.nn.init.zeros_(model.flow.shallow[0].proj_out.weight)
            torch.nn.init.zeros_(model.flow.shallow[0].proj_out.bias)
        x, (text, _) = latents(model), texts(model, 2)
        moved = x.clone()
        moved[:, place[0], :, place[1], place[2]] += 1
        before, after = (likelihood(model.flow, y, text, chunk_tokens=5) for y in (x, moved))
        changed = (before.loss_BTHW != after.loss_BTHW).nonzero()[:, 1:].unique(dim=0)
        assert changed.tolist() == [[3, *(i % n for i, n in zip(place[1:], (2, 3), strict=True))]]


def test_an_image_is_a_clip_of_one_frame_and_wrong_shapes_are_refused() -> None:
    model = tiny_model(video=False)
    x, (text, _) = latents(model), texts(model, 2)
    as_clip, as_image = likelihood(model.flow, x, text), likelihood(model.flow, x[:, 0], text)
    assert torch.equal(as_clip.loss_BTHW, as_image.loss_BTHW)
    with pytest.raises(ValueError, match="an image model takes one frame"):
        likelihood(model.flow, randn(1, 2, 4, 2, 3))
    clip = likelihood(model.flow, x)
    with pytest.raises(LikelihoodError, match="unit = 'bits'"):
        clip.nll("video", "bits")  # type: ignore[arg-type]
    with pytest.raises(LikelihoodError, match="per = 'clip'"):
        clip.loss("clip")  # type: ignore[arg-type]
    with pytest.raises(LikelihoodError, match="chunk_tokens = 0"):
        likelihood(model.flow, x, chunk_tokens=0)


def test_a_long_video_is_seen_through_its_windows() -> None:
    model = tiny_model()
    x, (text, _) = latents(model, frames=7), texts(model, 2)
    spec = SampleSpec(num_frames=7, grid=(2, 3), window_frames=4, context_frames=2)
    windows = [*spec.context_windows()]
    assert len(windows) > 2
    log_prob = likelihood(model.flow, x, text, windows=windows, chunk_tokens=9).log_prob("frame")
    for start, new, end in windows:
        alone = likelihood(model.flow, x[:, start:end], text).log_prob("frame")
        torch.testing.assert_close(
            log_prob[:, new:end], alone[:, new - start :], atol=1e-10, rtol=0
        )
    with pytest.raises(LikelihoodError, match="each of the 7 frames once"):
        likelihood(model.flow, x, text, windows=windows[:-1])


def test_noise_of_a_draw_depends_on_seed_draw_and_frame_alone() -> None:
    noise = draw_noise(3, 1, (4, 2, 3, 3))
    torch.manual_seed(0)
    assert torch.equal(draw_noise(3, 1, (4, 2, 3, 3)), noise)
    assert torch.equal(draw_noise(3, 1, (6, 2, 3, 3))[:4], noise)
    others = [draw_noise(4, 1, noise.shape), draw_noise(3, 2, noise.shape)]
    others += [draw_noise(3, 1, noise.shape, purpose="posterior"), noise.roll(1, 0)]
    assert all((other != noise).all() for other in others)
    assert abs(float(draw_noise(0, 0, (50, 4, 8, 8)).std()) - 1) < 0.03


def test_draws_have_a_mean_and_an_error_that_shrinks() -> None:
    model = tiny_model()
    x, (text, _) = latents(model), texts(model, 2)
    clips = noisy_likelihood(model.flow, x, text, draws=24, seed=5, chunk_tokens=7)
    assert clips.loss_BTHW.shape == (24, 2, 4, 2, 3)
    one = x + 0.3 * draw_noise(5, 2, x.shape[1:]).double()
    direct = likelihood(model.flow, one, text).log_prob()
    torch.testing.assert_close(clips.log_prob()[2], direct, atol=1e-10, rtol=0)
    alone = noisy_likelihood(model.flow, lambda _: x[1:], text[1:], draws=3, seed=5)
    torch.testing.assert_close(alone.log_prob()[:, 0], clips.log_prob()[:3, 1])
    mean, error = over_draws(clips.nll("frame", "bits_per_dim"))
    assert mean.shape == error.shape == (2, 4)
    few = over_draws(clips.nll("frame", "bits_per_dim")[:6]).standard_error
    assert 0 < error.mean() < few.mean() < 1
    assert over_draws(clips.loss()[:1]).standard_error.isnan().all()
    with pytest.raises(LikelihoodError, match="draws = 0"):
        noisy_likelihood(model.flow, x, text, draws=0)


def test_a_perfect_model_reaches_the_floor_and_is_never_accused() -> None:
    """With warnings as errors: over many seeds and few draws, chance alone must not warn."""
    sigma, x = 0.3, torch.full((1, 4, 4, 2, 3), 0.7, dtype=torch.float64)
    model = _perfect(sigma, 0.7)
    means = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(60):
            draws = 1 + seed % 2
            mean, error = over_draws(
                noisy_likelihood(model.flow, x, draws=draws, seed=seed).loss()[:, 0]
            )
            size = draws * x.numel()
            accused = check_noise_floor(
                float(mean), float(error), sigma, num_elements=size, what="x"
            )
            assert not accused
            means.append(float(mean))
    assert sum(means) / len(means) == pytest.approx(noise_floor(sigma), abs=0.02)
    assert min(means) < noise_floor(sigma)


def test_latents_without_their_noise_are_under_the_floor_and_said_so() -> None:
    """The true density of noisy latents, asked about latents with none of the noise or a third."""
    sigma, x = 0.3, torch.full((1, 4, 4, 2, 3), 0.7, dtype=torch.float64)
    model = _perfect(sigma, 0.7)
    for share in (0.0, 1 / 3):
        noise = torch.stack([draw_noise(0, d, x.shape[1:]) for d in range(4)])
        losses = likelihood(model.flow, x + share * sigma * noise).loss()
        mean, error = over_draws(losses)
        with pytest.warns(NoiseFloorWarning, match=r"test clip: .*carry no noise, or less than σ"):
            assert check_noise_floor(
                float(mean), float(error), sigma, num_elements=4 * x.numel(), what="test clip"
            )
    assert not check_noise_floor(math.nan, 0.1, sigma, num_elements=10, what="x")


MEASURE = """
import json, sys, torch
from pathlib import Path
from flow.config import FlowConfig
from flow.flow import DeepShallowFlow
from flow.likelihood import likelihood
chunk = int(sys.argv[1])
config = FlowConfig(latent_channels=16, text_len=8, text_dim=16, shallow_width=64, deep_width=256,
                    head_dim=64, layers_per_block=(1, 1, 6), noise_std=0.3, pos_len=4.0,
                    denoiser=False)
torch.manual_seed(0)
flow = DeepShallowFlow(config)
torch.nn.init.normal_(flow.deep.proj_out.weight, std=0.02)
x, text = torch.randn(1, 24, 16, 16, 16), torch.randn(1, 8, 16)
likelihood(flow, x[:, :1], text)
def held(what):
    # Not getrusage: its peak counts what the parent held when it forked.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
before = held("VmRSS:")
if chunk:
    loss = float(likelihood(flow, x, text, chunk_tokens=chunk).loss())
else:
    with torch.no_grad():
        loss = float(flow(x, text).loss())
print(json.dumps({"loss": loss, "extra": held("VmHWM:") - before}))
"""


def _measured(chunk: int) -> dict[str, float]:
    """Loss of 24 frames of 256 tokens, and the peak memory over what the process held before."""
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(chunk)],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    values = json.loads(child.stdout)
    assert isinstance(values, dict)
    return values


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_long_clip_is_that_of_one_attention() -> None:
    """6144 tokens: one tensor of the deep block is 6.3 MB.

    A cache of its layers is 76 MB, the square of the sequence 151 MB per head.
    """
    whole, chunked = _measured(0), _measured(256)
    assert chunked["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    tensor = 4 * 24 * 256 * 256
    # Five tensors at a time, and what the allocator and the small ones take.
    assert chunked["extra"] < 9 * tensor
    assert chunked["extra"] < 0.6 * whole["extra"]
