"""Laws of the two losses, in float64 where a model can be exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flow.config import tiny
from flow.flow import FlowModel, FlowOutput
from flow.likelihood import noise_floor
from training.objective import denoiser_backward, flow_backward


class GaussianFlow(nn.Module):
    """The exact flow of N(m, s²): z = (x − m)/s."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(math.log(std), dtype=torch.float64))

    def forward(self, x: Tensor, text: Tensor | None = None) -> FlowOutput:
        z = (x - self.mean) * torch.exp(-self.log_std)
        log_det = -self.log_std.expand_as(z)
        return FlowOutput(z, log_det, [log_det])


def test_with_the_exact_score_the_denoiser_is_tweedie() -> None:
    sigma, clean_std, mean = 0.45, 1.3, 0.7
    variance = clean_std**2 + sigma**2
    x = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64) * math.sqrt(variance) + mean
    flow = GaussianFlow(mean, math.sqrt(variance))
    target = flow_backward(flow, x, None, sigma, with_target=True).score_target
    assert target is not None
    score = -(x - mean) / variance
    torch.testing.assert_close(FlowModel.denoise(x, target), x + sigma**2 * score)
    # For a Gaussian that is the posterior mean of the clean latents.
    posterior = mean + (x - mean) * clean_std**2 / variance
    torch.testing.assert_close(FlowModel.denoise(x, target), posterior)


def test_the_target_is_the_gradient_of_the_log_density_of_a_real_flow() -> None:
    torch.manual_seed(0)
    config = tiny()
    flow = FlowModel(config).flow.double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    text = torch.randn(2, 6, 16, dtype=torch.float64)
    sigma = config.noise_std
    target = flow_backward(flow, x, text, sigma, with_target=True).score_target
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(flow(leaf, text).nats().sum(), leaf)
    torch.testing.assert_close(target, sigma * (sigma / 0.3) * gradient)


def test_the_target_of_a_sample_does_not_depend_on_its_batch() -> None:
    flow = GaussianFlow(0.0, 1.2)
    x = torch.randn(4, 2, 4, 3, 3, dtype=torch.float64)
    whole = flow_backward(flow, x, None, 0.3, with_target=True).score_target
    part = flow_backward(flow, x[:1], None, 0.3, with_target=True).score_target
    assert whole is not None
    assert part is not None
    torch.testing.assert_close(whole[:1], part)


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    config = tiny()
    model = FlowModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, text = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 6, 16)
    loss = flow_backward(model.flow, x, text, 0.3, with_target=True)
    assert model.denoiser is not None
    assert loss.score_target is not None
    denoiser_backward(model.denoiser, x, text, loss.score_target)
    missing = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # Rotary turns make the score of a key's bias alone no different; nothing else may be missing.
    assert missing == []


def test_the_denoiser_backward_leaves_the_flow_alone() -> None:
    model = FlowModel(tiny())
    x, text = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 6, 16)
    loss = flow_backward(model.flow, x, text, 0.3, with_target=True)
    before = [p.grad.clone() for p in model.flow.parameters() if p.grad is not None]
    assert model.denoiser is not None
    assert loss.score_target is not None
    denoiser_backward(model.denoiser, x, text, loss.score_target)
    after = [p.grad for p in model.flow.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_gaussian_is_under_the_noise_floor() -> None:
    sigma = 0.5
    exact = GaussianFlow(0.0, sigma)
    x = torch.randn(64, 4, 4, 8, 8, dtype=torch.float64) * sigma
    loss = flow_backward(exact, x, None, sigma, with_target=False)
    assert loss.score_target is None
    assert abs(float(loss.nats_per_dim) - noise_floor(sigma)) < 0.02
